"""What an answer looked at: alpha_V of its tokens, and the patches that they attended to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dattn.attention import Scoring, image_attention, visual_weight
from megatron_dattn.errors import ConfigError, DataError
from megatron_dattn.inference.load import LoadedModel
from megatron_dattn.inference.prompt import Prompt, pack_prompts


@dataclass(frozen=True)
class Look:
    """Every layer's attention to the images, of the text rows that predicted an answer's tokens.

    Where an image's row predicts a token (S-Attn, a caption's first), the text row before it
    stands here; it sees no image yet.
    """

    tokens: tuple[str, ...]
    weights: Tensor
    """alpha_V, equation 9, float32 [layers, tokens, heads]."""
    maps: Tensor
    """Probability of each visual row, mean over heads, float32 [layers, tokens, visual rows]."""
    grids: tuple[tuple[int, int], ...]
    """Patch rows and columns of each image, in the order of the visual rows."""

    def image_maps(self, token: int, layers: list[int] | None = None) -> list[Tensor]:
        """Where one token looked, [patch rows, patch columns] for each image, mean over layers.

        Args:
            token: place in the answer, from 0.
            layers: from 1; all of them where None.
        """
        rows = self.maps[self._layers(layers), token].mean(0)
        pieces = rows.split([height * width for height, width in self.grids])
        return [piece.view(grid) for piece, grid in zip(pieces, self.grids, strict=True)]

    def mean_weight(self, token: int, layers: list[int] | None = None) -> float:
        """alpha_V of one token, mean over heads and layers."""
        return self.weights[self._layers(layers), token].mean().item()

    def table(self) -> list[str]:
        """alpha_V by layer, mean over the answer's tokens, in lines of text."""
        lines = [f"alpha_V, mean over the answer's {len(self.tokens)} tokens", "layer  mean  heads"]
        for number, heads in enumerate(self.weights.mean(1), 1):
            low, high = heads.min().item(), heads.max().item()
            lines.append(f"{number:5d}  {heads.mean().item():.2f}  {low:.2f} to {high:.2f}")
        return lines

    def _layers(self, layers: list[int] | None) -> list[int]:
        """Checked, and counted from 0."""
        depth = len(self.weights)
        if layers is None:
            return list(range(depth))
        for layer in layers:
            if not 1 <= layer <= depth:
                raise ConfigError(f"there is no layer {layer}; the model has layers 1 to {depth}")
        return [layer - 1 for layer in layers]


@torch.inference_mode()
def look(loaded: LoadedModel, prompt: Prompt, answer: list[int]) -> Look:
    """Run a prompt and its answer once more, and watch.

    Args:
        answer: the token ids that were generated; an end token is not looked at.

    Raises:
        DataError: there is no image to look at, or no token that could.
        ConfigError: the preset drops patches, so visual rows have no place in the image.
    """
    if answer and answer[-1] in loaded.stop_ids:
        answer = answer[:-1]
    if not prompt.images:
        raise DataError("without an image there is no attention to show; give one")
    if not answer:
        raise DataError("the answer is empty; ask something else, or train longer")
    kept = loaded.model.attention.visual.keep
    if kept < 1.0:
        raise ConfigError(
            f"the preset {loaded.config.model.attention!r} keeps a share of {kept} of the patches "
            "and does not say which; attention cannot be laid over the image"
        )
    grids = (loaded.config.model.vision.grid,) * len(prompt.images)
    first = len(prompt.rows.input_ids) - 1
    rows = list(range(first, first + len(answer)))
    recorder = _Recorder(rows, sum(height * width for height, width in grids))
    batch = pack_prompts(loaded, [(prompt, answer[:-1])])
    loaded.model.forward_logits(
        batch, torch.zeros(1, dtype=torch.int64, device=batch.input_ids.device), recorder
    )
    tokens = tuple(str(loaded.tokenizer.decode([token])) for token in answer)
    return Look(tokens, torch.stack(recorder.weights), torch.stack(recorder.maps), grids)


class _Recorder:
    """An observer that keeps some text rows' attention to the images, layer after layer."""

    def __init__(self, rows: list[int], num_visual_rows: int) -> None:
        self._rows = rows
        self._num_visual_rows = num_visual_rows
        self.weights: list[Tensor] = []
        self.maps: list[Tensor] = []

    def __call__(self, layer_number: int, query: Tensor, key: Tensor, scoring: Scoring) -> None:
        self.weights.append(visual_weight(query, key, scoring)[self._rows].float().cpu())
        maps = image_attention(query, key, scoring, self._rows).mean(1).float().cpu()
        if maps.shape[1] == 0:  # a layer after the visual rows have left
            maps = maps.new_zeros(len(self._rows), self._num_visual_rows)
        self.maps.append(maps)

"""What an answer looked at: alpha_V of its tokens, and the patches that they attended to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dattn.attention.attention_maps import ReportInputs, alpha_v, image_attention
from megatron_dattn.config.pretrain import NO_ALPHA
from megatron_dattn.errors import ConfigError, DataError
from megatron_dattn.inference.load import LoadedModel
from megatron_dattn.inference.prompt import Prompt, pack_prompts
from megatron_dattn.models.config import ModelConfig


@dataclass(frozen=True)
class AttentionMaps:
    """Every layer's attention to the images, of the text tokens that predicted an answer's tokens.

    Where an image's token predicts a token (S-Attn, a caption's first), the text token before it
    stands here; it sees no image yet.
    """

    preset: str
    tokens: tuple[str, ...]
    alpha: Tensor | None
    """alpha_V, equation 9, float32 [layers, tokens, heads]; None where it has no meaning, because
    images are read by a cross-attention."""
    maps: Tensor
    """Probability of each patch, mean over heads, float32 [layers, tokens, patches of all images];
    0 for patches that do not enter the decoder."""
    grids: tuple[tuple[int, int], ...]
    """Patch rows and columns of each image or tile, in the order of the patches."""

    def image_maps(self, token: int, layers: list[int] | None = None) -> list[Tensor]:
        """Mean over layers of one token's maps, float32 [patch rows, patch columns] of each image.

        Args:
            token: place in the answer, from 0.
            layers: from 1; all of them where None.
        """
        tokens = self.maps[self._layers(layers), token].mean(0)
        pieces = tokens.split([height * width for height, width in self.grids])
        return [piece.view(grid) for piece, grid in zip(pieces, self.grids, strict=True)]

    def mean_alpha(self, token: int, layers: list[int] | None = None) -> float | None:
        """alpha_V of one token, mean over heads and layers; None where it has no meaning."""
        if self.alpha is None:
            return None
        return self.alpha[self._layers(layers), token].mean().item()

    def table(self) -> list[str]:
        """alpha_V by layer and head, mean over the answer's tokens, in lines of text."""
        if self.alpha is None:
            return [f"the preset '{self.preset}' {NO_ALPHA}"]
        names = [f"h{head}" for head in range(1, self.alpha.shape[2] + 1)]
        return [
            f"alpha_V by layer and head, mean over the answer's {len(self.tokens)} tokens",
            " ".join(["layer", " mean", *(f"{name:>4}" for name in names)]),
            *(
                " ".join([f"{number:5d}", f" {heads.mean():.2f}", *(f"{x:.2f}" for x in heads)])
                for number, heads in enumerate(self.alpha.mean(1), 1)
            ),
        ]

    def _layers(self, layers: list[int] | None) -> list[int]:
        """Checked, and counted from 0."""
        depth = len(self.maps)
        if layers is None:
            return list(range(depth))
        check_layers(layers, depth)
        return [layer - 1 for layer in layers]


def check_layers(layers: list[int], depth: int) -> None:
    """Raises ConfigError for a layer that a model of that depth does not have."""
    for layer in layers:
        if not 1 <= layer <= depth:
            raise ConfigError(f"there is no layer {layer}; the model has layers 1 to {depth}")


@torch.inference_mode()
def attention_maps(loaded: LoadedModel, prompt: Prompt, answer: list[int]) -> AttentionMaps:
    """Run a prompt and its answer once more, and watch.

    Args:
        answer: the token ids that were generated; an end token is not looked at.

    Raises DataError if there is no image to look at, or no token that could.
    """
    if answer and answer[-1] in loaded.stop_ids:
        answer = answer[:-1]
    if not prompt.images:
        raise DataError("without an image there is no attention to show; give one")
    if not answer:
        raise DataError("the answer is empty; ask something else, or train longer")
    model, config = loaded.model, loaded.config.model
    first = len(prompt.tokens.input_ids) - 1
    tokens = list(range(first, first + len(answer)))
    batch = pack_prompts(loaded, [(prompt, answer[:-1])])
    recorder = _Recorder(tokens, batch.layout.num_visual_tokens)
    model.forward_logits(
        batch, torch.zeros(1, dtype=torch.int64, device=batch.input_ids.device), recorder
    )
    patches = _patches(model.kept_patches(batch.pixel_values), config)
    maps = torch.stack(recorder.maps)
    whole = maps.new_zeros(*maps.shape[:2], len(prompt.pixels) * config.vision.num_patches)
    whole[..., patches] = maps
    return AttentionMaps(
        preset=config.attention,
        tokens=tuple(str(loaded.tokenizer.decode([token])) for token in answer),
        alpha=torch.stack(recorder.alpha) if recorder.alpha else None,
        maps=whole,
        grids=(config.vision.grid,) * len(prompt.pixels),
    )


def _patches(kept: Tensor | None, config: ModelConfig) -> Tensor | slice:
    """The place of every visual token among the patches of all images."""
    if kept is None:
        return slice(None)
    first = torch.arange(len(kept), device=kept.device) * config.vision.num_patches
    return (first.unsqueeze(1) + kept).flatten().cpu()


class _Recorder:
    """An observer that keeps some text tokens' attention to the images, layer after layer."""

    def __init__(self, tokens: list[int], num_visual_tokens: int) -> None:
        self._tokens = tokens
        self._num_visual_tokens = num_visual_tokens
        self.alpha: list[Tensor] = []
        self.maps: list[Tensor] = []

    def __call__(self, layer_number: int, query: Tensor, key: Tensor, inputs: ReportInputs) -> None:
        if inputs.plan.merge != "cascade":
            self.alpha.append(alpha_v(query, key, inputs)[self._tokens].float().cpu())
        maps = image_attention(query, key, inputs, self._tokens).mean(1).float().cpu()
        if maps.shape[1] == 0:  # a layer after the visual tokens have left
            maps = maps.new_zeros(len(self._tokens), self._num_visual_tokens)
        self.maps.append(maps)

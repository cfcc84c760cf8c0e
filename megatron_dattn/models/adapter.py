"""From vision features to tokens of the language model: a two-layer MLP with RMSNorm, positions.

The paper (section 3.1) names "a two-layer MLP adapter with RMSNorm" without its place. By default
it stands before the MLP: features come from the middle of the encoder, unnormalized and with
outlier channels, and the MLP's own output scale stays free to match the text embeddings'. Behind
the MLP, where the authors' later models have it, it would give visual tokens a root mean square of
1, many times that of a pretrained model's text tokens, and drown what the decoder layers add to the
residual stream. So the last norm, whichever it is, starts at the scale of text.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_dattn.attention import get_preset
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.feature_mlp import FeatureMLP
from megatron_dattn.models.fractional_positions import FractionalPositions
from megatron_dattn.models.learned_positions import PerPatchPositions, RowColumnPositions
from megatron_dattn.models.norm import RMSNorm

VisualPositions = RowColumnPositions | PerPatchPositions | FractionalPositions


class Adapter(FeatureMLP):
    """The MLP over features, then positions; tokens are replicated on the tensor-parallel ranks.

    Args:
        config: the vision encoder's, see `vision_transformer_config`.
        positions: places the tokens; None for no positions.
        sizes: of the `FeatureMLP`.
    """

    def __init__(
        self, config: TransformerConfig, *, positions: VisualPositions | None, **sizes: Any
    ) -> None:
        super().__init__(config, **sizes)
        self.positions = positions

    def forward(
        self, features: Tensor, grid: tuple[int, int], kept: Tensor | None = None
    ) -> Tensor:
        """Tokens for the language model.

        Args:
            features: [images, patches, input_size], all images of the same patch grid.
            grid: patch rows and patch columns of the whole images.
            kept: which of their patches these are, int64 [images, patches]; None if all.

        Returns:
            [images * patches, output_size].
        """
        tokens = self.project(features)
        if self.positions is not None:
            tokens = self.positions(tokens, grid, kept)
        return tokens.flatten(0, 1)

    @property
    def last_norm(self) -> RMSNorm | None:
        """The norm that decides the size of visual tokens; None where none stands behind the
        MLP."""
        if isinstance(self.positions, FractionalPositions):
            return self.positions.last_norm
        return self.output_norm if isinstance(self.output_norm, RMSNorm) else None

    @torch.no_grad()
    def start_at(self, scale: float) -> None:
        """Give the last norm's weights, if there is one, this value."""
        if self.last_norm is not None:
            self.last_norm.weight.fill_(scale)


def build_adapter(config: TransformerConfig, model: ModelConfig) -> Adapter | None:
    """The adapter that a model's preset asks for; None where the layers project features anew.

    Args:
        config: the vision encoder's, see `vision_transformer_config`.
        model: sizes and the preset.
    """
    if get_preset(model.attention).visual.source == "reproject":
        return None
    adapter = Adapter(
        config,
        input_size=model.vision.hidden_size,
        hidden_size=model.adapter.hidden_size or model.language.hidden_size,
        output_size=model.language.hidden_size,
        norm_eps=model.adapter.norm_eps,
        norm=model.adapter_norm,
        positions=_positions(config, model),
    )
    # The embeddings of a language model that is new, too, are drawn with this deviation.
    adapter.start_at(model.adapter.text_scale or model.language.initializer_range)
    return adapter


def _positions(config: TransformerConfig, model: ModelConfig) -> VisualPositions | None:
    size, settings = model.language.hidden_size, model.adapter
    match model.visual_embedding:
        case "row_column":
            return RowColumnPositions(size, settings.max_grid, config.params_dtype)
        case "per_patch":
            return PerPatchPositions(size, model.num_places, config.params_dtype)
        case "fractional":
            return FractionalPositions(config, size, model.num_places, settings.norm_eps)
        case _:
            return None

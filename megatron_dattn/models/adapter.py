"""From vision features to tokens of the language model: a two-layer MLP with RMSNorm, positions.

The MLP stands once in front of the decoder (`Adapter`). Where `visual.source` is "reproject"
(SAISA), every decoder layer has one of its own instead (`VisualProjector`): visual tokens have no
state then, but carry the encoder's features through all layers and pipeline stages, padded with
zeros to the language model's width, and each layer makes its keys and values of them anew.

The paper (section 3.1) names "a two-layer MLP adapter with RMSNorm" without its place. By default
it stands before the MLP: features come from the middle of the encoder, unnormalized and with
outlier channels, and the MLP's own output scale stays free to match the text embeddings'. Behind
the MLP, where the authors' later models have it, it would give visual tokens a root mean square of
1, many times that of a pretrained model's text tokens, and drown what the decoder layers add to the
residual stream. So the last norm, whichever it is, starts at the scale of text.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_dattn.models.config import AdapterNorm, ModelConfig
from megatron_dattn.models.norm import RMSNorm
from megatron_dattn.models.visual_positions import (
    FractionalPositions,
    PerPatchPositions,
    RowColumnPositions,
)

VisualPositions = RowColumnPositions | PerPatchPositions | FractionalPositions


class FeatureMLP(MegatronModule):
    """Linear -> GELU -> linear, with norms around them; subclasses say which tokens pass.

    The linear layers are cut over the tensor-parallel ranks. Under sequence parallelism, which the
    config says, they gather the tokens of all ranks and hand each rank its own tokens back.

    Args:
        config: gives dtype, initialization and sequence parallelism.
        input_size: width of the encoder's features.
        hidden_size: width of the MLP's middle.
        output_size: width of the language model.
        norm_eps: of the RMSNorms.
        norm: where they stand; `norm` is the one before the linear layers, `output_norm` behind.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        input_size: int,
        hidden_size: int,
        output_size: int,
        norm_eps: float,
        norm: AdapterNorm = "before",
    ) -> None:
        super().__init__(config=config)
        tp_group = get_tensor_model_parallel_group()
        self.norm, self.output_norm = IdentityOp(), IdentityOp()
        if norm in ("before", "both"):
            self.norm = RMSNorm(config, input_size, eps=norm_eps)
        if norm in ("behind", "both"):
            self.output_norm = RMSNorm(config, output_size, eps=norm_eps)
        self.linear_fc1 = ColumnParallelLinear(
            input_size,
            hidden_size,
            config=config,
            init_method=_init_for(input_size),
            tp_group=tp_group,
        )
        self.linear_fc2 = RowParallelLinear(
            hidden_size,
            output_size,
            config=config,
            init_method=_init_for(hidden_size),
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,  # else the bias comes beside the product, for a fused kernel
            tp_group=tp_group,
        )

    def project(self, features: Tensor) -> Tensor:
        """[..., input_size] -> [..., output_size], of the parameters' dtype."""
        middle, _ = self.linear_fc1(self.norm(features))
        tokens, _ = self.linear_fc2(F.gelu(middle))
        return self.output_norm(tokens)


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
            features: [images, patches, input_size], of the parameters' dtype, all images of the
                same patch grid.
            grid: patch rows and patch columns of the whole images.
            kept: which of their patches these are, int64 [images, patches]; None if all.

        Returns:
            [images * patches, output_size], same dtype.
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


class VisualProjector(FeatureMLP):
    """The adapter's MLP for one decoder layer.

    The released code of SAISA (section 3 of its paper: one projector per layer) has no norm; ours
    is the adapter's, for the same reason: features leave the encoder unnormalized.

    Args:
        config: the language model's, see `language_transformer_config`.
        feature_size: width of the encoder's features, at most `config.hidden_size`.
        norm_eps: of the RMSNorm.
    """

    def __init__(self, config: TransformerConfig, *, feature_size: int, norm_eps: float) -> None:
        super().__init__(
            config,
            input_size=feature_size,
            hidden_size=config.hidden_size,
            output_size=config.hidden_size,
            norm_eps=norm_eps,
        )
        self.feature_size = feature_size  # the zeros behind would change the norm's mean square

    def forward(self, tokens: Tensor) -> Tensor:
        """This layer's visual tokens.

        Args:
            tokens: [tokens, 1, hidden_size], of the model's dtype, as `features_as_tokens` makes
                them; under sequence parallelism this rank's share, equally many on every rank.

        Returns:
            Of the same tokens, of the same shape and dtype.
        """
        return self.project(tokens[..., : self.feature_size])


def features_as_tokens(features: Tensor, hidden_size: int) -> Tensor:
    """Features padded with zeros to the language model's width.

    [images, patches, feature_size] -> [images * patches, hidden_size], same dtype.
    """
    tokens = features.flatten(0, 1)
    return F.pad(tokens, (0, hidden_size - tokens.shape[1]))


def build_adapter(config: TransformerConfig, model: ModelConfig) -> Adapter | None:
    """The adapter that a model's preset asks for; None where the layers project features anew.

    Args:
        config: the vision encoder's, see `vision_transformer_config`.
        model: sizes and the preset.
    """
    if model.preset.visual.source == "reproject":
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


def _init_for(fan_in: int) -> partial[Tensor]:
    """Variance 1 / (3 fan_in), that of torch's own linear layers, at any width."""
    return partial(torch.nn.init.normal_, std=(3 * fan_in) ** -0.5)

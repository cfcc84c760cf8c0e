"""What the model is: vision encoder, adapter, language model, attention preset.

Field names follow Hugging Face's configs (`SiglipVisionConfig`, `MistralConfig`), so that a
converted checkpoint's model file can be read beside the original's config.json.
"""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

from megatron_dattn.attention import PRESETS, AttentionConfig
from megatron_dattn.attention.rotary_scaling import RotaryScaling
from megatron_dattn.attention.visual_config import kept_grid
from megatron_dattn.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from megatron_dattn.attention.backends.base import ScoreFunction

_GEMMA2_FIELDS = (
    *("hidden_activation", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
AdapterNorm = Literal["before", "behind", "both", "none"]
# Fields of `LanguageConfig` that a family lacks.
_FOREIGN_FIELDS = {
    "mistral": _GEMMA2_FIELDS,
    "llama": (*_GEMMA2_FIELDS, "sliding_window"),
    "qwen2": (*_GEMMA2_FIELDS, "sliding_window"),
    "qwen3": (*_GEMMA2_FIELDS, "sliding_window"),
    "gemma2": (),
}
# Tensor-parallel sizes that divide this divide every vocabulary, once padded.
_VOCAB_MULTIPLE = 64


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(section: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(value > 0, f"{prefix}.{name} must be positive, got {value}")


@dataclass(frozen=True)
class VisionConfig:
    """A SigLIP or CLIP vision transformer (defaults: SigLIP's so400m, patch 14, 384 pixels)."""

    family: Literal["siglip", "clip"] = "siglip"
    """CLIP has a class token, which attends but never leaves, and a norm before its first layer."""
    hidden_size: int = 1152
    """Width of the encoder's layers."""
    num_hidden_layers: int = 27
    """Layers of the published encoder; `feature_layer` says how many of them run."""
    num_attention_heads: int = 16
    """Heads of each layer; they share hidden_size equally."""
    intermediate_size: int = 4304
    """Width of the middle of each layer's MLP."""
    image_size: int = 384
    """Side of the square input in pixels; pixels beyond the last whole patch are ignored."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    layer_norm_eps: float = 1e-6
    """Added to the variance in the LayerNorms."""
    hidden_act: Literal["gelu_pytorch_tanh", "quick_gelu", "gelu"] = "gelu_pytorch_tanh"
    """Activation of the MLPs, in Hugging Face's words."""
    feature_layer: int = -2
    """Which hidden state feeds the adapter, as in LLaVA: -2 drops the last layer, -1 keeps all."""

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "vision",
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
            *("patch_size", "layer_norm_eps"),
        )
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"vision.hidden_size {self.hidden_size} is not a multiple of "
            f"vision.num_attention_heads {self.num_attention_heads}",
        )
        _require(
            self.image_size >= self.patch_size,
            f"vision.image_size {self.image_size} is smaller than one patch ({self.patch_size})",
        )
        _require(
            -self.num_hidden_layers <= self.feature_layer <= -1,
            f"vision.feature_layer {self.feature_layer} must lie between "
            f"{-self.num_hidden_layers} and -1",
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and patch columns of one image."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def num_places(self) -> int:
        """Tokens of an image inside the encoder: its patches and, in CLIP, the class token."""
        return self.num_patches + (self.family == "clip")

    @property
    def num_used_layers(self) -> int:
        """Layers that are built: those above the feature layer are never run."""
        # It counts hidden states as Hugging Face does: one before the first layer, one behind each.
        return self.num_hidden_layers + 1 + self.feature_layer


@dataclass(frozen=True)
class AdapterConfig:
    """RMSNorm and a two-layer MLP between encoder and language model (paper, section 3.1)."""

    norm: AdapterNorm | None = None
    """Where RMSNorms stand: before the MLP, behind it, in both places or in none (LLaVA-1.5). Where
    None, as the preset's source has it: behind in `vidi`, before elsewhere. Without effect where
    every layer has a projector of its own (`saisa`)."""
    input_norm: bool | None = None
    """The older name: true is norm "before", false "none". It is read, and becomes `norm`."""
    hidden_size: int | None = None
    """Width of the MLP's middle; the language model's hidden size where None."""
    norm_eps: float = 1e-5
    """Added to the mean square in the adapter's RMSNorms."""
    visual_position: Literal["row_column", "per_patch"] = "row_column"
    """What is learned in presets whose positions are learnable vectors: one per row and one per
    column of patches, or one per patch, as in CLIP."""
    max_grid: int = 64
    """Rows (and columns) of the learnable position tables; larger grids are interpolated."""
    num_places: int | None = None
    """The side, in patches, of the grid that a table of one vector per patch is learned for; with
    fractional positions, the number of places that every side of an image is stretched to. Where
    None, the patches per side of the encoder's images."""
    text_scale: float | None = None
    """What the adapter's last norm starts at, where it stands behind the MLP. Where None, the
    standard deviation of the language model's token embeddings (before Gemma's scaling), measured
    when a stage starts from weights without an adapter's; so visual tokens begin as large as
    text."""

    def __post_init__(self) -> None:
        optional = [
            name
            for name in ("hidden_size", "num_places", "text_scale")
            if getattr(self, name) is not None
        ]
        _require_positive(self, "adapter", "norm_eps", "max_grid", *optional)
        if self.input_norm is None:
            return
        named = norm_of_older_name(self.input_norm)
        _require(
            self.norm in (None, named),
            f"adapter.norm '{self.norm}' and adapter.input_norm {str(self.input_norm).lower()}, "
            f"its older name for '{named}', contradict each other; leave input_norm out",
        )
        object.__setattr__(self, "norm", named)
        object.__setattr__(self, "input_norm", None)


def norm_of_older_name(input_norm: bool) -> AdapterNorm:
    """The value of `adapter.input_norm` and the exports' `adapter_input_norm` in today's words."""
    return "before" if input_norm else "none"


def default_norm(attention: str) -> AdapterNorm:
    """The place of the norm in the adapter of a preset's source; ours where that does not say."""
    return "behind" if PRESETS[attention].positions.embedding == "fractional" else "before"


@dataclass(frozen=True)
class LanguageConfig:
    """A Mistral, Llama, Qwen or Gemma-2 decoder (defaults: Mistral-7B-v0.3)."""

    family: Literal["mistral", "llama", "qwen2", "qwen3", "gemma2"] = "mistral"
    """Qwen2 and 2.5 add biases to the projections of queries, keys and values, Qwen3 norms to the
    queries and keys of every head. Gemma-2 adds to the others' layer a norm behind attention and
    FFN, counts all its norms' weights from one, multiplies embeddings by sqrt(hidden_size) and lets
    every other layer's attention slide; see `docs/language_models.md`."""
    hidden_size: int = 4096
    """Width of the decoder's layers."""
    num_hidden_layers: int = 32
    """Decoder layers."""
    num_attention_heads: int = 32
    """Query heads of each layer."""
    num_key_value_heads: int = 8
    """Key and value heads, each shared by an equal group of query heads."""
    head_dim: int = 128
    """Width of a head."""
    intermediate_size: int = 14336
    """Width of the middle of each layer's gated FFN."""
    vocab_size: int = 32768
    """Entries of the vocabulary; embedding and head are padded to a multiple of 64."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary positions' wavelengths."""
    rope_scaling: RotaryScaling | None = None
    """Llama 3.1's, for texts longer than those of the first training; None where there is none."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in the RMSNorms."""
    hidden_activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    """Of the gated FFN."""
    query_pre_attn_scalar: float | None = None
    """Attention scores are divided by its square root; head_dim where None."""
    attn_logit_softcapping: float | None = None
    """c turns every attention score s into c * tanh(s / c)."""
    final_logit_softcapping: float | None = None
    """The same for the logits."""
    sliding_window: int | None = None
    """So many tokens, itself included, a token sees at most: in every layer, or, in Gemma-2, in the
    first, third, fifth ... layer."""
    max_position_embeddings: int | None = None
    """How many positions the pretrained model was made for; None where its source does not say.
    Nothing here depends on it: it is passed on to exports, whose users' tools read it."""
    tie_word_embeddings: bool = False
    """Whether the head's weight is the embedding's."""
    initializer_range: float = 0.02
    """Standard deviation of new weights, where a model is not imported."""

    def __post_init__(self) -> None:
        optional = (
            *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
            *("sliding_window", "max_position_embeddings"),
        )
        _require_positive(
            self,
            "language",
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "intermediate_size", "vocab_size", "rope_theta", "rms_norm_eps"),
            *(name for name in optional if getattr(self, name) is not None),
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"language.num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"language.num_key_value_heads {self.num_key_value_heads}",
        )
        _require(self.head_dim % 2 == 0, f"language.head_dim {self.head_dim} must be even")
        self._check_rope_scaling()
        usual = {field.name: field.default for field in fields(self)}
        for name in _FOREIGN_FIELDS[self.family]:
            _require(
                getattr(self, name) == usual[name],
                f"language.{name} {getattr(self, name)} is nothing that a model of "
                f"language.family '{self.family}' has; leave it out",
            )

    def _check_rope_scaling(self) -> None:
        scaling = self.rope_scaling
        if scaling is None:
            return
        names = [field.name for field in fields(scaling)]
        _require_positive(scaling, "language.rope_scaling", *names)
        _require(
            scaling.low_freq_factor < scaling.high_freq_factor,
            f"language.rope_scaling.low_freq_factor {scaling.low_freq_factor} must be less than "
            f"language.rope_scaling.high_freq_factor {scaling.high_freq_factor}",
        )

    def rotary_tables(
        self, positions: "torch.Tensor", device: "torch.device"
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Cosine and sine of the angles at these positions, int64 [tokens] -> float32 [tokens,
        head_dim] each."""

        from megatron_dattn.attention.positions import rotary_tables

        scaling = self.rope_scaling
        return rotary_tables(positions, self.head_dim, self.rope_theta, device, scaling)

    @property
    def score_function(self) -> "ScoreFunction":
        """Of every layer's attention."""
        from megatron_dattn.attention.backends.base import ScoreFunction

        scale = (self.query_pre_attn_scalar or self.head_dim) ** -0.5
        return ScoreFunction(scale, self.attn_logit_softcapping)

    @property
    def has_qkv_bias(self) -> bool:
        """True if the projections of queries, keys and values have biases."""
        return self.family == "qwen2"

    @property
    def has_qk_norms(self) -> bool:
        """True if every head's queries and keys are normalized before they are rotated."""
        return self.family == "qwen3"

    @property
    def has_post_norms(self) -> bool:
        """True if what attention and FFN add is normalized before it is added."""
        return self.family == "gemma2"

    @property
    def zero_centred_norms(self) -> bool:
        """True if norms multiply with 1 + weight."""
        return self.family == "gemma2"

    @property
    def embedding_scale(self) -> float:
        """The factor of all tokens before the first layer."""
        return self.hidden_size**0.5 if self.family == "gemma2" else 1.0

    @property
    def padded_vocab_size(self) -> int:
        """Entries of embedding and head: the vocabulary's and, behind them, those of no token.

        A property of the model, not of its layout over ranks, so that checkpoints fit every layout.
        The vocabularies of all published models that are supported need no padding.
        """
        return -(-self.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, counted from 0; None if it sees everything."""
        slides = self.family != "gemma2" or layer % 2 == 0
        return self.sliding_window if slides else None


@dataclass(frozen=True)
class ModelConfig:
    """The whole vision-language model."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    attention: str = "dattn"
    """Name of an attention preset, see megatron_dattn/attention/presets.py."""

    def __post_init__(self) -> None:
        _require(
            self.attention in PRESETS,
            f"model.attention '{self.attention}' is unknown; choose one of {', '.join(PRESETS)}",
        )
        _check_sizes_for_preset(self)

    @property
    def preset(self) -> AttentionConfig:
        """The attention that `attention` names."""
        return PRESETS[self.attention]

    @property
    def adapter_norm(self) -> AdapterNorm:
        """The places of the adapter's RMSNorms."""
        return self.adapter.norm or default_norm(self.attention)

    @property
    def visual_embedding(self) -> str:
        """A value of the axis `positions.embedding`: the preset's, or what the adapter learns."""
        embedding = self.preset.positions.embedding
        return self.adapter.visual_position if embedding == "row_column" else embedding

    @property
    def num_places(self) -> int:
        """The side of the grid that positions of patches are learned for."""
        return self.adapter.num_places or self.vision.grid[0]

    @property
    def image_grid(self) -> tuple[int, int]:
        """Grid of an image's tokens in the decoder: its patches, or a line of those kept of
        them."""
        return kept_grid(self.vision.grid, self.preset.visual)

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens of an image in the decoder."""
        rows, columns = self.image_grid
        return rows * columns


def _check_sizes_for_preset(model: ModelConfig) -> None:
    preset = model.preset
    features, hidden = model.vision.hidden_size, model.language.hidden_size
    _require(
        preset.visual.source != "reproject" or features <= hidden,
        f"model.attention '{model.attention}' carries the encoder's features through the decoder, "
        f"but vision.hidden_size {features} is larger than language.hidden_size {hidden}; choose "
        "another preset or a smaller encoder",
    )
    _require(
        model.adapter.visual_position == "row_column" or model.visual_embedding == "per_patch",
        f"adapter.visual_position '{model.adapter.visual_position}' has no effect: the positions "
        f"of model.attention '{model.attention}' ({preset.positions.embedding}) are not learnable "
        "vectors; leave it out",
    )
    _require(
        preset.positions.embedding != "fractional" or hidden % 2 == 0,
        f"model.attention '{model.attention}' places patches by sines and cosines in equal number, "
        f"but language.hidden_size {hidden} is odd",
    )

"""Configuration of a vision-language model with Decomposed Attention.

This file travels with the exported weights and imports nothing but transformers.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from .versions_dattn import TESTED_RANGE, check_transformers

check_transformers()  # in front of the imports, whose names older versions lack

from transformers import (  # noqa: E402
    AutoConfig,
    CLIPVisionConfig,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

# By model type, the default first. A model whose layers differ from these needs code in
# decoder_dattn.py or vision_dattn.py before its type may stand here.
TEXT_CONFIGS = {
    "mistral": MistralConfig,
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
}
VISION_CONFIGS = {
    "siglip_vision_model": SiglipVisionConfig,
    "clip_vision_model": CLIPVisionConfig,
}

_CHOICES = {
    "adapter_norm": ("before", "behind", "both", "none"),
    "v2v": ("diagonal", "none"),
    "t2v_scope": ("all", "following"),
    "text_positions": ("text_only", "gap"),
    "visual_positions": ("none", "sequence"),
    "visual_embedding": ("none", "row_column", "per_patch", "fractional"),
    "visual_source": ("stream", "reproject"),
    "merge": ("alpha", "sum", "tanh", "sigmoid", "cascade"),
}
# What transformers writes into a config or takes from it without declaring it.
_OF_EVERY_MODEL = {
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "custom_pipelines",
    "eos_token_id",
    "experts_implementation",
    "is_decoder",
    "pad_token_id",
    "per_layer_config",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
    "use_cache",
}


class DAttnConfig(PreTrainedConfig):
    """Sizes of the three parts, and how visual tokens (V) and text tokens (T) attend.

    Args:
        vision_config: of the whole encoder (SigLIP or CLIP), as it was trained.
        text_config: of the language model (Mistral, Llama, Qwen2, Qwen3 or Gemma-2).
        image_token_id: id of `<image>`. One such token in the text marks one image's place; it is
            no token of the language model.
        vision_feature_layer: which of the encoder's hidden states feeds the adapter, from the end:
            -2 leaves out the last layer, -1 none. Layers above it do not exist here.
        adapter_hidden_size: width of the adapter's middle.
        adapter_norm: where RMSNorms stand: "before" the adapter's first layer, "behind" its last,
            in "both" places or in "none".
        adapter_norm_eps: of the adapter's norms.
        adapter_max_grid: entries of the tables of row and column positions.
        adapter_num_places: the side of the grid that positions per patch are learned for; with
            fractional positions, the number of places that a side is stretched to. The image's
            patches per side where None.
        v2v: what attention adds to a visual token: its own value ("diagonal") or nothing ("none").
        t2v_scope: which images a text token sees: "all" of its sample, or those it is "following".
        t2v_rotary: whether the scores of T2V use rotary positions.
        text_positions: rotary positions of text count "text_only", or leave a "gap" for images.
        visual_positions: rotary positions of visual tokens: as text in "sequence", or "none".
        visual_embedding: what is added to visual tokens before the first layer: a learned vector
            for each row and column of patches or for each patch, an MLP of the place as a share of
            the side, or nothing.
        visual_source: whether visual tokens are what the layers make of the adapter's output
            ("stream"), or every layer makes its own from the encoder's features ("reproject");
            there is no adapter then.
        merge: how T2V and T2T join: one softmax over both ("alpha"), or two, added ("sum"), T2V
            weighted by tanh(gate), or both weighted by sigmoid(gate) and the rest; or T2V is a
            cross-attention of its own in front of the self-attention ("cascade").
        transformers_tested: the versions of transformers that the model's code was tested with,
            for the reader of config.json.
        **kwargs: what every config of transformers has.

    Raises:
        TypeError: an argument that neither this code nor transformers has.
        ValueError: an encoder, a language model or a choice that the model's code does not know.
    """

    model_type = "dattn"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: dict[str, Any] | PreTrainedConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        image_token_id: int = 10,
        vision_feature_layer: int = -2,
        adapter_hidden_size: int = 4096,
        adapter_norm: str = "before",
        adapter_norm_eps: float = 1e-5,
        adapter_max_grid: int = 64,
        adapter_num_places: int | None = None,
        v2v: str = "diagonal",
        t2v_scope: str = "all",
        t2v_rotary: bool = False,
        text_positions: str = "text_only",
        visual_positions: str = "none",
        visual_embedding: str = "row_column",
        visual_source: str = "stream",
        merge: str = "alpha",
        transformers_tested: str = TESTED_RANGE,
        **kwargs: Any,
    ) -> None:
        _check_names(kwargs)
        self.vision_config: Any = _section("vision_config", vision_config, VISION_CONFIGS)
        self.text_config: Any = _section("text_config", text_config, TEXT_CONFIGS)
        self.image_token_id = image_token_id
        self.vision_feature_layer = vision_feature_layer
        self.adapter_hidden_size = adapter_hidden_size
        self.adapter_norm = adapter_norm
        self.adapter_norm_eps = adapter_norm_eps
        self.adapter_max_grid = adapter_max_grid
        self.adapter_num_places = adapter_num_places or self.image_grid[0]
        self.v2v = v2v
        self.t2v_scope = t2v_scope
        self.t2v_rotary = t2v_rotary
        self.text_positions = text_positions
        self.visual_positions = visual_positions
        self.visual_embedding = visual_embedding
        self.visual_source = visual_source
        self.merge = merge
        self.transformers_tested = transformers_tested
        self._check_choices()
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def image_grid(self) -> tuple[int, int]:
        """Patch rows and patch columns of an image."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return side, side

    @property
    def tokens_per_image(self) -> int:
        rows, columns = self.image_grid
        return rows * columns

    @property
    def is_clip(self) -> bool:
        """True if the encoder has a class token, which is no feature, and a norm before its layers.
        SigLIP has neither."""
        return self.vision_config.model_type == "clip_vision_model"

    @property
    def is_gemma2(self) -> bool:
        """True if the language model has Gemma-2's norms and scales its embeddings."""
        return self.text_config.model_type == "gemma2"

    @property
    def has_qkv_bias(self) -> bool:
        """True if the projections of queries, keys and values have biases."""
        return self.text_config.model_type == "qwen2"

    @property
    def has_qk_norms(self) -> bool:
        """True if every head's queries and keys are normalized."""
        return self.text_config.model_type == "qwen3"

    @property
    def head_dim(self) -> int:
        text = self.text_config
        head_dim: int | None = getattr(text, "head_dim", None)
        return head_dim or text.hidden_size // text.num_attention_heads

    @property
    def sliding_window(self) -> int | None:
        """Number of text tokens, itself included, that a text token sees at most in layers that
        slide; None for all. Images are seen whatever it is."""
        window: int | None = getattr(self.text_config, "sliding_window", None)
        return window

    def slides(self, layer: int) -> bool:
        """True if a layer's attention to text has a window; in Gemma-2 every other layer's has."""
        kinds = getattr(self.text_config, "layer_types", None)
        return self.sliding_window is not None and (
            kinds is None or kinds[layer] == "sliding_attention"
        )

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}; choose one of {choices}")
        if self.t2v_rotary != (self.visual_positions == "sequence"):
            raise ValueError("t2v_rotary needs visual_positions='sequence', which has no other use")
        if self.t2v_rotary and self.merge == "cascade":
            raise ValueError("merge='cascade' reads images without positions; unset t2v_rotary")
        has_state = self.v2v != "none" or self.visual_embedding != "none"
        if self.visual_source == "reproject" and has_state:
            raise ValueError(
                "visual_source='reproject' leaves visual tokens no state to add to; set v2v='none' "
                "and visual_embedding='none'"
            )


def _check_names(names: Iterable[str]) -> None:
    """Refuse what transformers would keep as an attribute that nobody reads: a misspelt axis."""
    for name in names:
        is_usual = name.startswith("_") or hasattr(PreTrainedConfig, name)
        if not is_usual and name not in _OF_EVERY_MODEL:
            raise TypeError(f"DAttnConfig has no argument {name!r}; take it out of config.json")


def _section(
    name: str,
    config: dict[str, Any] | PreTrainedConfig | None,
    known: Mapping[str, type[PreTrainedConfig]],
) -> PreTrainedConfig:
    """A part's config, of the class that its model type asks for."""
    if isinstance(config, PreTrainedConfig):
        values, kind = {}, config.model_type
    else:
        values = dict(config or {})
        kind = values.pop("model_type", next(iter(known)))
    if kind not in known:
        raise ValueError(f"{name} is of type '{kind}'; this code knows {', '.join(known)}")
    return config if isinstance(config, PreTrainedConfig) else known[kind](**values)

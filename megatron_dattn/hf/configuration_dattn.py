"""Configuration of a vision-language model with Decomposed Attention.

This file travels with the exported weights and imports nothing but transformers.
"""

from typing import Any

from transformers import MistralConfig, PreTrainedConfig, SiglipVisionConfig

# A language model whose layers differ from Mistral's needs its own decoder layer in
# modeling_dattn.py before its type may stand here.
TEXT_CONFIGS = {"mistral": MistralConfig}

_CHOICES = {
    "v2v": ("diagonal", "none"),
    "t2v_scope": ("all", "following"),
    "text_positions": ("text_only", "gap"),
    "visual_positions": ("none", "sequence"),
    "visual_embedding": ("none", "row_column", "fractional"),
    "merge": ("alpha", "sum", "tanh", "sigmoid"),
}


class DAttnConfig(PreTrainedConfig):
    """Sizes of the three parts, and how visual rows (V) and text rows (T) attend.

    Args:
        vision_config: of the whole SigLIP encoder, as it was trained.
        text_config: of the language model.
        image_token_id: id of `<image>`. One such token in the text marks one image's place; it is
            no row of the language model.
        vision_feature_layer: which of the encoder's hidden states feeds the adapter, from the end:
            -2 leaves out the last layer, -1 none. Layers above it do not exist here.
        adapter_hidden_size: width of the adapter's middle.
        adapter_input_norm: whether an RMSNorm stands before the adapter's first layer.
        adapter_norm_eps: of the adapter's norms.
        adapter_max_grid: entries of the tables of row and column positions; with fractional
            positions, the number of places that a side is stretched to.
        v2v: what attention adds to a visual row: its own value ("diagonal") or nothing ("none").
        t2v_scope: which images a text row sees: "all" of its sample, or those it is "following".
        t2v_rotary: whether the scores of T2V use rotary positions.
        text_positions: rotary positions of text count "text_only", or leave a "gap" for images.
        visual_positions: rotary positions of visual rows: as text in "sequence", or "none".
        visual_embedding: what is added to visual rows before the first layer: a learned vector for
            each row and column of patches, an MLP of the place as a share of the side, or nothing.
        merge: how T2V and T2T join: one softmax over both ("alpha"), or two, added ("sum"), T2V
            weighted by tanh(gate), or both weighted by sigmoid(gate) and the rest.

    Raises:
        ValueError: a language model or a choice that the model's code does not know.
    """

    model_type = "dattn"
    sub_configs = {"vision_config": SiglipVisionConfig, "text_config": MistralConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: dict[str, Any] | SiglipVisionConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        image_token_id: int = 10,
        vision_feature_layer: int = -2,
        adapter_hidden_size: int = 4096,
        adapter_input_norm: bool = True,
        adapter_norm_eps: float = 1e-5,
        adapter_max_grid: int = 64,
        v2v: str = "diagonal",
        t2v_scope: str = "all",
        t2v_rotary: bool = False,
        text_positions: str = "text_only",
        visual_positions: str = "none",
        visual_embedding: str = "row_column",
        merge: str = "alpha",
        **kwargs: Any,
    ) -> None:
        if not isinstance(vision_config, SiglipVisionConfig):
            vision_config = SiglipVisionConfig(**(vision_config or {}))
        self.vision_config: Any = vision_config
        self.text_config: Any = _text_config(text_config)
        self.image_token_id = image_token_id
        self.vision_feature_layer = vision_feature_layer
        self.adapter_hidden_size = adapter_hidden_size
        self.adapter_input_norm = adapter_input_norm
        self.adapter_norm_eps = adapter_norm_eps
        self.adapter_max_grid = adapter_max_grid
        self.v2v = v2v
        self.t2v_scope = t2v_scope
        self.t2v_rotary = t2v_rotary
        self.text_positions = text_positions
        self.visual_positions = visual_positions
        self.visual_embedding = visual_embedding
        self.merge = merge
        self._check_choices()
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def image_grid(self) -> tuple[int, int]:
        """Patch rows and patch columns of an image."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return side, side

    @property
    def rows_per_image(self) -> int:
        rows, columns = self.image_grid
        return rows * columns

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}; choose one of {choices}")
        if self.t2v_rotary != (self.visual_positions == "sequence"):
            raise ValueError("t2v_rotary needs visual_positions='sequence', which has no other use")


def _text_config(config: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    values = config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config or {})
    kind = values.pop("model_type", "mistral")
    if kind not in TEXT_CONFIGS:
        raise ValueError(
            f"text_config is of type '{kind}'; this code knows {', '.join(TEXT_CONFIGS)}"
        )
    return config if isinstance(config, PreTrainedConfig) else TEXT_CONFIGS[kind](**values)

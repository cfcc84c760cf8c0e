"""What a decoder layer's attention does with visual rows: a few axes, and presets that name them.

Visual (V) and text (T) rows meet in four kinds of pairs, written query-to-key: V2V, V2T, T2V, T2T.
T2T is the causal attention of the language model in every preset; the axes below say what happens
in the other three and which positions the rotary embedding uses. The oracle in `reference.py` is
the executable meaning of each value.
"""

from dataclasses import dataclass, field
from typing import Literal

from megatron_dattn.attention.layout import TextScope
from megatron_dattn.errors import ConfigError


@dataclass(frozen=True)
class TextToVisual:
    """T2V: how a text row sees the images of its sample."""

    # "all": every text row sees every image. "following": only the text rows after an image do.
    scope: TextScope = "all"
    # Whether these scores use rotary positions; False is the paper's debiasing (section 2.3).
    rotary: bool = False


@dataclass(frozen=True)
class Positions:
    """Where the rotary embedding, and the learnable one, place the rows."""

    # "gap": text ids continue after an image's rows. "text_only": text rows are counted alone.
    text: Literal["gap", "text_only"] = "text_only"
    # "sequence": visual rows count like text in reading order. "none": they have no rotary id.
    visual: Literal["sequence", "none"] = "none"
    # "row_column": a learnable two-dimensional embedding on visual rows before the first layer.
    embedding: Literal["none", "row_column"] = "row_column"


@dataclass(frozen=True)
class AttentionConfig:
    """One way of attending over visual and text rows. The defaults are the `dattn` preset.

    Raises ConfigError for combinations that have no meaning.
    """

    # "diagonal": a visual row's output is its own value (equation 2); no score is computed.
    v2v: Literal["causal", "diagonal"] = "diagonal"
    # "preceding": a visual row sees the text before its image, as in a causal language model.
    v2t: Literal["none", "preceding"] = "none"
    t2v: TextToVisual = field(default_factory=TextToVisual)
    positions: Positions = field(default_factory=Positions)
    # "alpha": one softmax over all keys a row sees, computed in parts (equations 3 to 9).
    merge: Literal["alpha"] = "alpha"

    def __post_init__(self) -> None:
        if self.v2v == "diagonal" and self.v2t == "preceding":
            raise ConfigError(
                "attention: v2v='diagonal' gives visual rows no scores, so they cannot see text; "
                "set v2t='none' or v2v='causal'"
            )
        if self.v2t == "preceding" and self.t2v.scope == "all":
            raise ConfigError(
                "attention: with v2t='preceding' and t2v.scope='all' a text row would see, through "
                "the image, text that comes after itself; set t2v.scope='following' or v2t='none'"
            )
        if self.rotates_visual_rows and self.positions.visual == "none":
            raise ConfigError(
                "attention: v2v='causal' and t2v.rotary=true rotate visual rows, which need "
                "positions.visual='sequence'"
            )
        if not self.rotates_visual_rows and self.positions.visual == "sequence":
            raise ConfigError(
                "attention: positions.visual='sequence' has no effect with v2v='diagonal' and "
                "t2v.rotary=false; set positions.visual='none'"
            )
        if self.positions.visual == "sequence" and self.positions.text == "text_only":
            raise ConfigError(
                "attention: positions.text='text_only' gives text the ids that "
                "positions.visual='sequence' gives to images; set positions.text='gap'"
            )

    @property
    def rotates_visual_rows(self) -> bool:
        """Whether any score uses the rotary position of a visual row."""
        return self.v2v == "causal" or self.t2v.rotary

    @property
    def is_self_attention(self) -> bool:
        """Whether this is plain causal self-attention over the rows in reading order."""
        sees_all_before = self.v2v == "causal" and self.v2t == "preceding"
        return sees_all_before and self.t2v == TextToVisual(scope="following", rotary=True)


_SEQUENCE_POSITIONS = Positions(text="gap", visual="sequence", embedding="none")

PRESETS: dict[str, AttentionConfig] = {
    # The paper's baseline and LLaVA's attention: visual rows are treated as text. One causal
    # softmax in reading order with one-dimensional rotary positions over all rows. Table 2, row 1.
    "s_attn": AttentionConfig(
        v2v="causal",
        v2t="preceding",
        t2v=TextToVisual(scope="following", rotary=True),
        positions=_SEQUENCE_POSITIONS,
    ),
    # The paper's method: V2V diagonal (section 2.2), T2V non-causal without rotary positions
    # (section 2.3), merged with T2T by alpha-weighting (section 2.4). Learnable row and column
    # embeddings stand in for the missing positions. The paper leaves the text ids open; counting
    # text alone keeps them inside the range the language model was trained on however large |V|.
    "dattn": AttentionConfig(),
    # Diagonal V2V with the rotary positions kept in T2V: all rows have sequence ids, so visual rows
    # far from a text row are disfavoured (figure 2). Table 2, row 2: what debiasing is worth.
    "dattn_biased": AttentionConfig(
        t2v=TextToVisual(scope="all", rotary=True),
        positions=_SEQUENCE_POSITIONS,
    ),
    # The cell that Table 2 leaves out: S-Attn with debiased T2V. V2V and V2T are causal with
    # sequence positions; text after an image sees all of it without rotary positions, and visual
    # rows get the learnable embedding. Text before an image must not see it here: the image has
    # seen that text, later words included, and would tell the answer.
    "s_attn_debias": AttentionConfig(
        v2v="causal",
        v2t="preceding",
        t2v=TextToVisual(scope="following", rotary=False),
        positions=Positions(text="gap", visual="sequence", embedding="row_column"),
    ),
}


def get_preset(name: str) -> AttentionConfig:
    """The preset of that name. Raises ConfigError with the names there are."""
    if name not in PRESETS:
        raise ConfigError(f"unknown attention preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]

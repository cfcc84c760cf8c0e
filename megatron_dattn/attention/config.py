"""What a decoder layer's attention does with visual tokens: a few axes, and what they exclude.

Visual (V) and text (T) tokens meet in four kinds of pairs, written query-to-key: V2V, V2T, T2V,
T2T. T2T is the causal attention of the language model in every configuration; the axes below say
what happens in the other three, which positions the rotary embedding uses, and how T2V and T2T
join. The oracle in `reference.py` is the executable meaning of each value; `presets.py` names the
combinations that have been published.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_dattn.attention.visual_config import VisualTokensConfig, unknown_values
from megatron_dattn.errors import ConfigError

TextScope = Literal["all", "following"]
Merge = Literal["alpha", "sum", "tanh", "sigmoid", "cascade"]


def _refuse(mistakes: Iterator[str]) -> None:
    for mistake in mistakes:
        raise ConfigError(f"attention: {mistake}")


@dataclass(frozen=True)
class TextToVisual:
    """T2V: how a text token sees the images of its sample."""

    # "all": every text token sees every image. "following": only the text tokens after an image do.
    scope: TextScope = "all"
    # Whether these scores use rotary positions; False is the paper's debiasing (section 2.3).
    rotary: bool = False
    # In layers with a sliding window of W tokens. "none": images never fall out of sight.
    # "inherit": a text token sees an image while fewer than W text tokens, itself included, stand
    # behind it.
    window: Literal["none", "inherit"] = "none"

    def __post_init__(self) -> None:
        _refuse(unknown_values(self, "t2v."))


_LIKE_TEXT = TextToVisual(scope="following", rotary=True)


@dataclass(frozen=True)
class Positions:
    """Where the rotary embedding, and the learnable one, place the tokens."""

    # "gap": text ids continue after an image's ids. "text_only": text tokens are counted alone.
    text: Literal["gap", "text_only"] = "text_only"
    # "sequence": visual tokens count like text in reading order. "ring": the patches of one ring of
    # the image share an id, counted from the border inwards. "none": they have no rotary id.
    visual: Literal["sequence", "ring", "none"] = "none"
    # Added to visual tokens before the first layer. "row_column": a learnable vector for each row
    # of patches and for each column. "per_patch": one for each patch. "fractional": an MLP of the
    # place as a share of the image's side.
    embedding: Literal["none", "row_column", "per_patch", "fractional"] = "row_column"

    def __post_init__(self) -> None:
        _refuse(unknown_values(self, "positions."))


@dataclass(frozen=True)
class AttentionConfig:
    """One way of attending over visual and text tokens. The defaults are the `dattn` preset.

    Raises ConfigError for combinations that have no meaning.
    """

    # "causal": a visual token sees the earlier ones of its sample and itself. "ring": it sees
    # earlier images, and its own from the border up to its own ring. "window": it sees the patches
    # around it in its own image. "diagonal": its output is its own value (equation 2), no score is
    # computed. "none": its attention output is zero.
    v2v: Literal["causal", "ring", "window", "diagonal", "none"] = "diagonal"
    # The side, in patches, of the square around a patch that v2v="window" shows it.
    v2v_window: int | None = None
    # "preceding": a visual token sees the text before its image, as in a causal language model.
    # "prompt": it sees the sample's prompt too, also where that stands after the image.
    v2t: Literal["none", "preceding", "prompt"] = "none"
    t2v: TextToVisual = field(default_factory=TextToVisual)
    positions: Positions = field(default_factory=Positions)
    # "alpha": one softmax over all keys a token sees, computed in parts (equations 3 to 9). The
    # others keep a softmax for T2V and one for T2T and add the results: plainly ("sum"), T2V times
    # tanh(gate), or T2V times sigmoid(gate) and T2T times the rest. A gate is learnable, per head.
    # "cascade": T2V is a cross-attention with projections of its own, before the self-attention.
    merge: Merge = "alpha"
    # What a layer's sliding window counts, in layers that have one. "part": the tokens that a
    # causal part holds; those are text tokens alone, but all tokens in plain self-attention, which
    # is one such part. "reading_order": all tokens, images included, for text tokens whose visual
    # tokens attend to nothing: what plain self-attention leaves of itself where its visual tokens
    # are frozen.
    window: Literal["part", "reading_order"] = "part"
    visual: VisualTokensConfig = field(default_factory=VisualTokensConfig)
    # Of a preset, in words: source, mask, positions, parameters, cost. It decides nothing.
    about: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        _refuse(unknown_values(self))
        _refuse(_conflicts(self))

    @property
    def scores_visual_tokens(self) -> bool:
        """True if visual tokens attend to anything but themselves, and so need queries."""
        return self.v2v in ("causal", "ring", "window")

    @property
    def outputs_visual_tokens(self) -> bool:
        """True if attention adds anything to visual tokens, and so needs their output
        projection."""
        return self.v2v != "none"

    @property
    def rotates_visual_tokens(self) -> bool:
        """True if any score uses the rotary position of a visual token."""
        return self.scores_visual_tokens or self.t2v.rotary

    @property
    def has_gate(self) -> bool:
        """True if the merge takes a learnable gate."""
        return self.merge in ("tanh", "sigmoid")

    @property
    def visual_tokens_predict(self) -> bool:
        """True if an image's token predicts the text after it: it has read the text before it, and
        the last layer computes it, which only a range up to 1 freezes (`layer_rules`)."""
        frozen_last = self.visual.frozen is not None and self.visual.frozen[1] == 1.0
        return self.v2t != "none" and self.visual.exit == 1.0 and not frozen_last

    @property
    def attends_in_reading_order(self) -> bool:
        """True if attention is the language model's own: one causal softmax over tokens of both
        kinds in reading order, whatever else becomes of visual tokens. A sliding window counts them
        all."""
        sees_all_before = self.v2v == "causal" and self.v2t == "preceding"
        return sees_all_before and self.t2v == _LIKE_TEXT and self.merge == "alpha"

    @property
    def window_in_reading_order(self) -> bool:
        """True if a layer's sliding window counts the tokens of images, too, for every token."""
        return self.attends_in_reading_order or self.window == "reading_order"


def _conflicts(config: AttentionConfig) -> Iterator[str]:
    """Why axes do not go together, and the remedy."""
    yield from _conflicts_of_attention(config)
    yield from _conflicts_of_windows(config)
    yield from _conflicts_of_tokens(config)


def _conflicts_of_attention(config: AttentionConfig) -> Iterator[str]:
    visual, text = config.positions.visual, config.positions.text
    side = config.v2v_window
    if config.v2v == "window" and not (isinstance(side, int) and side > 0 and side % 2):
        yield f"v2v='window' needs an odd v2v_window, to have a patch in its centre; it is {side}"
    if config.v2v != "window" and side is not None:
        yield f"v2v_window={side} has no effect with v2v='{config.v2v}'; leave it out"
    if config.merge == "cascade" and config.scores_visual_tokens:
        yield (
            f"merge='cascade' is a module that asks for text tokens alone, but v2v='{config.v2v}' "
            "makes visual tokens ask, too; set v2v='diagonal' or 'none'"
        )
    if not config.scores_visual_tokens and config.v2t != "none":
        yield (
            f"v2v='{config.v2v}' gives visual tokens no scores, so they cannot see text; "
            "set v2t='none' or v2v='causal'"
        )
    if config.v2t != "none" and config.t2v.scope == "all":
        yield (
            f"with v2t='{config.v2t}' and t2v.scope='all' a text token would see, through the "
            "image, text that comes after itself; set t2v.scope='following' or v2t='none'"
        )
    if config.rotates_visual_tokens and visual == "none":
        yield (
            "v2v='causal', 'ring' or 'window' and t2v.rotary=true rotate visual tokens, which need "
            "positions.visual='sequence' or 'ring'"
        )
    if not config.rotates_visual_tokens and visual != "none":
        yield (
            f"positions.visual='{visual}' has no effect with v2v='{config.v2v}' and "
            "t2v.rotary=false; set positions.visual='none'"
        )
    if visual != "none" and text == "text_only":
        yield (
            "positions.text='text_only' gives text the ids that "
            f"positions.visual='{visual}' gives to images; set positions.text='gap'"
        )


def _conflicts_of_windows(config: AttentionConfig) -> Iterator[str]:
    t2v = config.t2v
    plain = replace(config.t2v, window="none") == _LIKE_TEXT and config.merge == "alpha"
    plain = plain and (config.v2v, config.v2t) == ("causal", "preceding")
    if plain and t2v.window == "inherit":
        yield (
            "t2v.window='inherit' counts text tokens, but these axes are plain self-attention, "
            "whose window counts all tokens in reading order and so hides images; leave "
            "t2v.window out"
        )
    if config.window != "reading_order":
        return
    if config.scores_visual_tokens:
        yield (
            f"window='reading_order' is for visual tokens without scores, not v2v='{config.v2v}'; "
            "leave it out: plain self-attention counts so by itself"
        )
    if t2v.scope != "following":
        yield (
            f"window='reading_order' looks back from a token, but t2v.scope='{t2v.scope}' shows it "
            "images behind it; set t2v.scope='following'"
        )
    if t2v.window != "none":
        yield (
            f"window='reading_order' hides images already; t2v.window='{t2v.window}' would count "
            "them in another way; leave one of the two out"
        )


def _conflicts_of_tokens(config: AttentionConfig) -> Iterator[str]:
    tokens = config.visual
    if tokens.source == "reproject" and config.v2v != "none":
        yield (
            f"visual.source='reproject' leaves visual tokens no state that v2v='{config.v2v}' "
            "could add to; set v2v='none'"
        )
    if tokens.source == "reproject" and config.positions.embedding != "none":
        yield "visual.source='reproject' has no tokens to embed; set positions.embedding='none'"
    if tokens.keep < 1.0 and (
        config.v2v in ("ring", "window") or config.positions.visual == "ring"
    ):
        yield (
            f"visual.keep={tokens.keep} leaves no grid of patches, which rings and windows need; "
            "set visual.keep=1"
        )
    if tokens.frozen is not None and tokens.frozen[0] >= tokens.exit:
        yield (
            f"visual.frozen={tokens.frozen} begins where visual tokens are gone, after "
            f"visual.exit={tokens.exit}; leave frozen out"
        )
    if tokens.frozen is not None and config.v2v == "none" and tokens.ffn == 0.0:
        yield (
            f"visual.frozen={tokens.frozen} has no effect: with v2v='none' and visual.ffn=0 no "
            "layer changes visual tokens; leave frozen out"
        )
    if tokens.heads < 1.0 and config.merge != "alpha":
        yield f"visual.heads={tokens.heads} is defined for merge='alpha', not '{config.merge}'"

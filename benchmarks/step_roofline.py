"""The least time that one training step of the whole model can take on a machine.

`roofline.py`'s operators, of every layer and of what stands around them, all modules trained and
nothing fused between operators:

    vision encoder   patch embedding, norms, q k v, attention over an image's patches, FFN
    adapter          norm and both products; a preset's projectors are part of its layers
    decoder          every layer by its own rule, the exact savings left out
    head             embedding, final norm of text tokens, logits of labelled tokens, their loss in
    fp32 optimizer        per weight: its fp32 gradient set to zero, added to, read for the norm and
                     scaled; both moments of Adam and the fp32 weight read and written, a BF16
                     copy written

Position tables and biases, padding, communication and the reading of batches are not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from benchmarks.roofline import LayerRun, Operator, Work, layer_operators, moved, norm, product
from megatron_dattn.attention.layers import layer_rules
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExactSavings
from megatron_dattn.planner.layer_sizes import LayerSizes
from megatron_dattn.planner.parameters import count_parameters

_FP32 = 4
# What selective recomputation repeats, in the decoder.
_SELECTED = ("norm 1", "norm 2", "SwiGLU")


@dataclass(frozen=True)
class StepRun:
    """How a step of one micro-batch is run: everything that operations and bytes depend on."""

    model: ModelConfig
    layout: TokenLayout
    labelled_tokens: int
    value_bytes: int
    """Bytes per value of weights and activations."""
    recompute: str = "none"
    savings: ExactSavings = field(default_factory=ExactSavings)


def step_operators(run: StepRun) -> tuple[Operator, ...]:
    """Of forward and backward pass and the update, first to last."""
    repeated = (*_encoder(run), *_decoder(run))
    if run.recompute != "none":
        whole = run.recompute == "full"
        repeated = tuple(
            replace(operator, recomputed=operator.recomputed or whole or operator.name in _SELECTED)
            for operator in repeated
        )
    return (*_patches(run), *repeated, *_adapter(run), *_head(run), *_optimizer(run))


def _patches(run: StepRun) -> Iterator[Operator]:
    """Pixels want no gradient: the backward pass is the weight's alone."""
    vision = run.model.vision
    tokens = len(run.layout.images) * vision.num_patches
    inputs = 3 * vision.patch_size**2
    both = product("patch embedding", tokens, inputs, vision.hidden_size, run.value_bytes)
    yield replace(both, backward=both.forward)


def _encoder(run: StepRun) -> tuple[Operator, ...]:
    vision, b = run.model.vision, run.value_bytes
    d, f, places = vision.hidden_size, vision.intermediate_size, vision.num_places
    tokens, pairs = len(run.layout.images) * places, len(run.layout.images) * places**2
    statistics = _FP32 * vision.num_attention_heads * tokens
    layer = (
        norm("encoder norm 1", tokens, d, b),
        product("encoder queries, keys, values", tokens, d, 3 * d, b),
        Operator(
            "attention",
            Work(4 * d * pairs, 4 * tokens * d * b + statistics),
            Work(10 * d * pairs, 8 * tokens * d * b + statistics),
        ),
        product("encoder output", tokens, d, d, b),
        moved("encoder residual 1", 3 * tokens * d, 3 * tokens * d, b),
        norm("encoder norm 2", tokens, d, b),
        product("encoder FFN, first", tokens, d, f, b),
        moved("encoder GELU", 2 * tokens * f, 3 * tokens * f, b),
        product("encoder FFN, second", tokens, f, d, b),
        moved("encoder residual 2", 3 * tokens * d, 3 * tokens * d, b),
    )
    return layer * vision.num_used_layers


def _adapter(run: StepRun) -> Iterator[Operator]:
    model, b = run.model, run.value_bytes
    if model.preset.visual.source == "reproject":
        return
    tokens = len(run.layout.images) * model.tokens_per_image
    inputs, outputs = model.vision.hidden_size, model.language.hidden_size
    middle = model.adapter.hidden_size or outputs
    if model.adapter_norm in ("before", "both"):
        yield norm("adapter norm", tokens, inputs, b)
    yield product("adapter, first", tokens, inputs, middle, b)
    yield moved("adapter GELU", 2 * tokens * middle, 3 * tokens * middle, b)
    yield product("adapter, second", tokens, middle, outputs, b)
    if model.adapter_norm in ("behind", "both"):
        yield norm("adapter norm behind", tokens, outputs, b)


def _decoder(run: StepRun) -> tuple[Operator, ...]:
    language = run.model.language
    sizes = LayerSizes(
        language.hidden_size,
        language.num_attention_heads,
        language.num_key_value_heads,
        language.head_dim,
        language.intermediate_size,
        run.model.vision.hidden_size,
    )
    rules = layer_rules(
        run.model.preset,
        language.num_hidden_layers,
        skip_unread=run.savings.unread_tokens,
    )
    return tuple(
        operator
        for rule in rules
        for operator in layer_operators(
            LayerRun(run.layout, rule, sizes, run.value_bytes, run.savings)
        )
    )


def _head(run: StepRun) -> Iterator[Operator]:
    language, b = run.model.language, run.value_bytes
    d, vocabulary, text = (
        language.hidden_size,
        language.padded_vocab_size,
        run.layout.num_text_tokens,
    )
    tokens = run.labelled_tokens if run.savings.labelled_logits else text
    yield moved("embedding", 2 * text * d, 2 * text * d, b)
    yield norm("final norm", text, d, b)
    yield product("head", tokens, d, vocabulary, b)
    yield moved("loss", 2 * tokens * vocabulary, 2 * tokens * vocabulary, _FP32)


def _optimizer(run: StepRun) -> Iterator[Operator]:
    weights = sum(count_parameters(run.model).values())
    # Set to zero, read and written when a pass adds to it, read for the norm, read and written when
    # it is clipped.
    gradient = 6 * _FP32 + run.value_bytes
    # The gradient read; both moments and the weight read and written.
    update = 7 * _FP32 + (run.value_bytes if run.value_bytes != _FP32 else 0)
    yield Operator("optimizer", Work(0, weights * (gradient + update)), Work())

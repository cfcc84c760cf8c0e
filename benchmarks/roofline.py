"""The least time that one decoder layer can take on a machine, forward and backward.

The layer is written down as operators, each with its operations and the bytes that it must read
and write if nothing stays in a cache between operators. An operator takes no less than
max(operations / peak operations per second, bytes / peak bytes per second), and the layer no less
than the sum. What is fused is counted as one operator: flash attention, a norm, SwiGLU.

With n visual and t text tokens, N = n + t, hidden size d, query width q, key/value width e, FFN
width f and b bytes per value, in a forward pass (operations of matrix products only):

    product of [m, k] and [k, j]   2mkj operations, b (mk + kj + mj) bytes
    flash attention                4q per scored pair; queries, keys, values, output, log-sum-exp
    eager attention                4q N^2, masked pairs too; every step reads and writes N^2 scores
    norm, residual, SwiGLU         2d, 3d and 3f values per token
    rotary                         queries and keys of rotated tokens, read and written
    merge of two parts             three outputs of the text tokens

A backward pass costs a product twice the forward (gradients of input and weight), flash attention
10q per pair (scores again, and four gradients), eager attention 8q N^2.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_dattn.attention.layers import LayerRule
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.plan.parts import plan_attention
from megatron_dattn.attention.visual_config import num_shared
from megatron_dattn.models.execution import ExactSavings
from megatron_dattn.planner.layer_sizes import LayerSizes
from megatron_dattn.planner.part_flops import attended_pairs

NAIVE = ExactSavings(visual_queries=False, folded_output=False, unread_tokens=False)
"""Nothing saved: the equations of the paper as they are written."""
MIDDLE_LAYER = ExactSavings(unread_tokens=False)
"""The engine's default in every layer but the last: the next layer reads all tokens."""
_FP32 = 4


@dataclass(frozen=True)
class Work:
    """Operations, and bytes moved between memory and processor."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Operator:
    """One step of the layer that nothing else is fused with."""

    name: str
    forward: Work
    backward: Work
    recomputed: bool = False
    """The backward pass begins with the forward pass again."""

    @property
    def passes(self) -> tuple[Work, ...]:
        """The operator as it is run in one training step."""
        return (self.forward, *((self.forward,) if self.recomputed else ()), self.backward)


@dataclass(frozen=True)
class Machine:
    """The two ceilings of a device, measured or from its data sheet."""

    flops_per_second: float
    bytes_per_second: float


def bound_seconds(operators: tuple[Operator, ...], machine: Machine) -> float:
    """No faster than this, forward and backward."""
    return sum(
        max(work.flops / machine.flops_per_second, work.bytes / machine.bytes_per_second)
        for operator in operators
        for work in operator.passes
    )


def total_work(operators: tuple[Operator, ...]) -> Work:
    """Operations and bytes of one training step."""
    return sum((work for operator in operators for work in operator.passes), Work())


@dataclass(frozen=True)
class LayerRun:
    """How one layer is run: everything that operations and bytes depend on."""

    layout: TokenLayout
    rule: LayerRule
    sizes: LayerSizes
    value_bytes: int
    """Bytes per value of weights and activations."""
    savings: ExactSavings = MIDDLE_LAYER
    eager: bool = False
    """Scores of all pairs are kept in memory; for plain self-attention alone."""
    recompute: bool = False

    @property
    def projects_visual_queries(self) -> bool:
        return self.rule.attention.scores_visual_tokens or not self.savings.visual_queries

    @property
    def folds_output(self) -> bool:
        return self.rule.attention.v2v == "diagonal" and self.savings.folded_output


def layer_operators(run: LayerRun) -> tuple[Operator, ...]:
    """The layer's operators, first to last."""
    run = replace(run, layout=run.rule.layout(run.layout))
    assert not run.eager or run.rule.attention.attends_in_reading_order, (
        "eager means self-attention"
    )
    attention = (*_projections(run), *_attention(run), *_output(run))
    chunked = run.savings.ffn_chunk_tokens > 0
    ffn = [replace(operator, recomputed=chunked) for operator in _ffn(run)]
    operators = (*attention, *ffn)
    if run.recompute:
        return tuple(replace(operator, recomputed=True) for operator in operators)
    return operators


def product(name: str, tokens: int, inputs: int, outputs: int, value_bytes: int) -> Operator:
    """Tokens times a weight; each of the two gradients moves the same three matrices."""
    moved = value_bytes * (tokens * inputs + inputs * outputs + tokens * outputs)
    once = Work(2 * tokens * inputs * outputs, moved)
    return Operator(name, once, once + once)


def moved(name: str, forward: int, backward: int, value_bytes: int) -> Operator:
    """No products: so many values read or written."""
    return Operator(name, Work(0, value_bytes * forward), Work(0, value_bytes * backward))


def norm(name: str, tokens: int, width: int, value_bytes: int) -> Operator:
    """Reads and writes a token; backward reads it again with the gradient."""
    return moved(name, 2 * tokens * width, 3 * tokens * width, value_bytes)


def _projections(run: LayerRun) -> Iterator[Operator]:
    """Norm, queries, keys, values, and what a preset projects besides."""
    sizes, b = run.sizes, run.value_bytes
    d, q, e = sizes.hidden_size, sizes.query_width, sizes.key_value_width
    visual, text = run.layout.num_visual_tokens, run.layout.num_text_tokens
    config = run.rule.attention
    yield norm("norm 1", visual + text, d, b)
    if run.projects_visual_queries:
        yield product("queries, keys, values", visual + text, d, q + 2 * e, b)
    else:
        yield product("queries", text, d, q, b)
        yield product("keys, values", visual + text, d, 2 * e, b)
    if config.visual.source == "reproject":
        yield product("reprojection, first", visual, sizes.vision_hidden_size, d, b)
        yield product("reprojection, second", visual, d, d, b)
    if config.merge == "cascade" and visual:
        yield product("cascade, queries", text, d, q, b)
        yield product("cascade, keys, values", visual, d, 2 * e, b)
        yield product("cascade, output", text, q, d, b)


def _attention(run: LayerRun) -> Iterator[Operator]:
    config, sizes, b = run.rule.attention, run.sizes, run.value_bytes
    q, e = sizes.query_width, sizes.key_value_width
    visual, text = run.layout.num_visual_tokens, run.layout.num_text_tokens
    rotated_queries = text + visual * config.scores_visual_tokens
    rotated_keys = text + visual * config.rotates_visual_tokens
    turned = 2 * (rotated_queries * q + rotated_keys * e)
    yield moved("rotary", turned, turned, b)
    yield from _eager_scores(run) if run.eager else _flash_parts(run)


def _flash_parts(run: LayerRun) -> Iterator[Operator]:
    """All parts as one operator, and the merges between them."""
    sizes, b = run.sizes, run.value_bytes
    q, e, heads = sizes.query_width, sizes.key_value_width, sizes.num_attention_heads
    plan = plan_attention(run.layout, run.rule.attention)
    parts = (*plan.parts, *plan.visual_parts)
    queries = sum(part.query_tokens.length for part in parts)
    keys = sum(part.key_tokens.length for part in parts)
    pairs = sum(attended_pairs(run.layout, run.rule.attention).values())
    statistics = _FP32 * heads * queries
    # Queries, keys, values in, output out; backward also reads the output and its gradient.
    forward = Work(4 * q * pairs, b * (2 * queries * q + 2 * keys * e) + statistics)
    backward = Work(10 * q * pairs, b * (4 * queries * q + 4 * keys * e) + statistics)
    yield Operator("attention", forward, backward)
    merged = sum(part.query_tokens.length for part in parts[1:]) * q
    yield moved("merge", 3 * merged, 3 * merged, b)


def _eager_scores(run: LayerRun) -> Iterator[Operator]:
    """Plain products and a softmax in fp32, step by step: what `eager.py` does."""
    sizes, b = run.sizes, run.value_bytes
    q, e = sizes.query_width, sizes.key_value_width
    tokens = run.layout.num_visual_tokens + run.layout.num_text_tokens
    scores = sizes.num_attention_heads * tokens**2
    # Keys and values are repeated for every query head; gradients are summed over them.
    yield moved("repeated heads", 2 * tokens * (e + q), 2 * tokens * (e + q), b)
    half = Work(2 * q * tokens**2, b * (2 * tokens * q + scores))
    yield Operator("scores", half, half + half)
    mask = b * tokens**2
    scaled_and_masked = Work(0, 4 * b * scores + mask)
    yield Operator("scale and mask", scaled_and_masked, Work(0, 2 * b * scores))
    cast = (_FP32 + b) * scores if b != _FP32 else 0
    softmax = Work(0, (b + _FP32) * scores + cast)
    yield Operator("softmax", softmax, Work(0, (2 * _FP32 + b) * scores + cast))
    yield Operator("values", half, half + half)


def _output(run: LayerRun) -> Iterator[Operator]:
    """Output projection and residual of the tokens that attention gives something."""
    sizes, b = run.sizes, run.value_bytes
    d, q, e = sizes.hidden_size, sizes.query_width, sizes.key_value_width
    visual, text = run.layout.num_visual_tokens, run.layout.num_text_tokens
    diagonal = run.rule.attention.v2v == "diagonal"
    with_output = visual if run.rule.attention.outputs_visual_tokens else 0
    if run.folds_output:
        # The weight is summed over groups, once, and its gradient spread over them.
        yield moved("folded weight", d * (q + e), d * (q + e), b)
        yield product("output, visual tokens", visual, e, d, b)
        yield product("output, text tokens", text, q, d, b)
    else:
        if diagonal:
            yield moved("repeated values", visual * (e + q), visual * (e + q), b)
        yield product("output", with_output + text, q, d, b)
    added = 3 * (with_output + text) * d
    yield moved("residual 1", added, added, b)


def _ffn(run: LayerRun) -> Iterator[Operator]:
    """Norm, gated FFN, residual of the tokens that pass it."""
    sizes, b = run.sizes, run.value_bytes
    d, f = sizes.hidden_size, sizes.intermediate_size
    visual, text = run.layout.num_visual_tokens, run.layout.num_text_tokens
    if run.rule.visual_ffn == 1.0:
        passing = [(visual + text, f)]
    else:
        share = run.rule.visual_ffn
        passing = [(text, f), (visual, num_shared(f, share) if share else 0)]
    for tokens, width in passing:
        if tokens == 0 or width == 0:
            continue
        yield norm("norm 2", tokens, d, b)
        yield product("gate and up", tokens, d, 2 * width, b)
        yield moved("SwiGLU", 3 * tokens * width, 5 * tokens * width, b)
        yield product("down", tokens, width, d, b)
        yield moved("residual 2", 3 * tokens * d, 3 * tokens * d, b)

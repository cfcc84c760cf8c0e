"""What the attention tests share: layouts to draw, tensors to fill, and how errors are measured."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from megatron_dattn.attention import PRESETS, AttentionConfig
from megatron_dattn.attention.backends.base import Backend, ScoreFunction
from megatron_dattn.attention.config import Positions, TextToVisual
from megatron_dattn.attention.decomposed import attend_images, decomposed_attention
from megatron_dattn.attention.layers import layer_rules
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.plan.parts import AttentionPlan, plan_attention
from megatron_dattn.attention.positions import Rotary, rotary_tables, token_positions
from megatron_dattn.attention.reference import described_positions, reference_attention
from megatron_dattn.attention.visual_config import VisualTokensConfig

HEAD_DIM = 8
SCALE = HEAD_DIM**-0.5
SCORES = ScoreFunction(SCALE)
BASE = 100.0  # of the rotary frequencies

IN_SEQUENCE = Positions(text="gap", visual="sequence", embedding="none")
_INHERIT = TextToVisual(window="inherit")
_INHERIT_ROTATED = TextToVisual("following", rotary=True, window="inherit")
# What no preset has: layers that presets consist of, and values of the windows' axes.
VARIANTS = {
    "frozen": layer_rules(PRESETS["shortv"], 5, skip_unread=False)[-1].attention,
    "frozen_yopo": layer_rules(PRESETS["yopo"], 2, skip_unread=True)[0].attention,
    "frozen_debias": layer_rules(
        replace(PRESETS["s_attn_debias"], visual=VisualTokensConfig(exit=0.5)), 2, skip_unread=True
    )[0].attention,
    "reading_order": AttentionConfig(
        t2v=TextToVisual("following"), merge="sum", window="reading_order"
    ),
    "inherit": AttentionConfig(t2v=_INHERIT),
    "inherit_sigmoid": AttentionConfig(t2v=_INHERIT, merge="sigmoid"),
    "inherit_cascade": AttentionConfig(t2v=_INHERIT, merge="cascade"),
    "inherit_naavit": AttentionConfig(v2v="none", t2v=_INHERIT_ROTATED, positions=IN_SEQUENCE),
    "inherit_debias": replace(
        PRESETS["s_attn_debias"], t2v=TextToVisual("following", window="inherit")
    ),
}
CONFIGS = PRESETS | VARIANTS

# Images before, between, back to back and after the text; a text-only sample; padding tokens.
RICH_LAYOUT = TokenLayout(
    text_lengths=(5, 3, 4, 1),
    images=(
        ImageSpan(0, 2, (2, 2)),
        ImageSpan(0, 2, (1, 1)),
        ImageSpan(0, 5, (1, 3)),
        ImageSpan(2, 0, (1, 2)),
        ImageSpan(3, 1, (2, 1)),
    ),
    visual_budget=15,
    text_budget=16,
    prompt_lengths=(3, 3, 1, 0),
)
TEXT_ONLY_LAYOUT = TokenLayout((3, 2), (), visual_budget=2, text_budget=6, prompt_lengths=(1, 2))


@st.composite
def layouts(draw: st.DrawFn) -> TokenLayout:
    """Up to four samples of up to six text tokens, each with up to three images anywhere."""
    text_lengths = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    images = []
    for sample, length in enumerate(text_lengths):
        offsets = sorted(draw(st.lists(st.integers(0, length), max_size=3)))
        for offset in offsets:
            grid = draw(st.tuples(st.integers(1, 3), st.integers(1, 5)))
            images.append(ImageSpan(sample, offset, grid))
    visual_tokens = sum(image.num_tokens for image in images)
    return TokenLayout(
        text_lengths,
        tuple(images),
        visual_budget=visual_tokens + draw(st.integers(0, 3)),
        text_budget=sum(text_lengths) + draw(st.integers(0, 3)),
        prompt_lengths=tuple(draw(st.integers(0, length)) for length in text_lengths),
    )


@dataclass
class Problem:
    """Random projections for a layout, and the gradient that arrives at the output."""

    query: Tensor
    key: Tensor
    value: Tensor
    rotary: Rotary
    grad_out: Tensor
    gate: Tensor | None  # [Hq], where the merge has one
    head_mask: Tensor | None = None  # [Hk], where heads do not see images

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        return self.inputs if self.gate is None else (*self.inputs, self.gate)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Problem":
        def move(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().to(device, dtype).requires_grad_()

        moved = (move(x) for x in self.inputs)
        cos, sin = (table.to(device) for table in self.rotary)
        gate = None if self.gate is None else move(self.gate)
        mask = None if self.head_mask is None else self.head_mask.to(device)
        return Problem(*moved, (cos, sin), self.grad_out.to(device, dtype), gate, mask)


def make_problem(
    layout: TokenLayout,
    config: AttentionConfig,
    dtype: torch.dtype = torch.float64,
    *,
    group: int = 2,
    head_dim: int = HEAD_DIM,
    seed: int = 0,
) -> Problem:
    """Two key heads, `group` query heads for each."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(layout.num_tokens, heads, head_dim) for heads in (2 * group, 2, 2, 2 * group)]
    # Rounded to the tested dtype first, so that the oracle sees the very same numbers.
    draws = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    query, key, value = (x.requires_grad_() for x in draws[:3])
    gate = torch.randn(2 * group, generator=generator).to(dtype).requires_grad_()
    rotary = rotary_tables(token_positions(layout, config), head_dim, base=BASE)
    mask = torch.tensor([1.0, 0.0]) if config.visual.heads < 1.0 else None
    return Problem(query, key, value, rotary, draws[3], gate if config.has_gate else None, mask)


def fast_output(
    problem: Problem, plan: AttentionPlan, backend: Backend, *, softcap: float | None = None
) -> Tensor:
    """All of a plan's attention; where images are read apart ("cascade"), both results added."""
    arguments = (*problem.inputs, plan, problem.rotary)
    options = {
        "score_function": ScoreFunction(problem.query.shape[-1] ** -0.5, softcap),
        "backend": backend,
    }
    out = decomposed_attention(
        *arguments, **options, gate=problem.gate, head_mask=problem.head_mask
    )
    if plan.merge != "cascade":
        return out
    first, _ = plan.scored_tokens
    query, *others = arguments
    images = attend_images(query[first:], *others, **options)
    return out + torch.cat((out.new_zeros(first, *out.shape[1:]), images))


def run_fast(
    problem: Problem,
    layout: TokenLayout,
    config: AttentionConfig,
    backend: Backend,
    *,
    softcap: float | None = None,
    window: int | None = None,
) -> list[Tensor]:
    """Output and gradients of query, key and value, and of the gate if there is one."""
    plan = plan_attention(layout, config, problem.query.device, window=window)
    out = fast_output(problem, plan, backend, softcap=softcap)
    return [out, *torch.autograd.grad(out, problem.differentiable, problem.grad_out)]


def run_oracle(
    problem: Problem,
    layout: TokenLayout,
    config: AttentionConfig,
    *,
    softcap: float | None = None,
    window: int | None = None,
) -> list[Tensor]:
    """The same from the oracle, in float64 on the same numbers, at its own positions."""
    exact = problem.to(torch.float64)
    positions = torch.tensor(described_positions(layout, config), device=exact.query.device)
    head_dim = exact.query.shape[-1]
    rotary = rotary_tables(positions, head_dim, base=BASE, device=exact.query.device)
    arguments = (*exact.inputs, layout, config, rotary)
    options = {
        "score_function": ScoreFunction(exact.query.shape[-1] ** -0.5, softcap),
        "gate": exact.gate,
        "head_mask": exact.head_mask,
        "window": window,
    }
    out = reference_attention(*arguments, **options)
    if config.merge == "cascade":
        out = out + reference_attention(*arguments, **options, images_alone=True)
    return [out, *torch.autograd.grad(out, exact.differentiable, exact.grad_out)]


def assert_close_norm(actual: Tensor, expected: Tensor, unit: Tensor, tolerance: float) -> None:
    """The error's norm stays under `tolerance` of the larger of the norms of `expected`, `unit`.

    A gradient can vanish exactly (a softmax over one key) where rounding leaves noise of the size
    of `unit`, the gradient that came in.
    """
    error = (actual.double().cpu() - expected).norm()
    allowed = tolerance * max(expected.norm(), unit.double().cpu().norm())
    assert error <= allowed, f"error {error:.3g} exceeds {allowed:.3g}"

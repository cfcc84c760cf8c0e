"""Text over the images of all ranks, in float64, against one process that has them all."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dattn.attention import PRESETS, AttentionConfig
from megatron_dattn.attention.backends.base import ScoreFunction
from megatron_dattn.attention.backends.select import select_backend
from megatron_dattn.attention.decomposed import attend_images, attend_scored_tokens
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.plan.parts import plan_attention
from megatron_dattn.parallel.context.exchange import ContextExchange
from megatron_dattn.parallel.context.shares import ContextShare, share_of
from megatron_dattn.parallel.context.softmax import ImagesOfAllRanks, share_gradient, weigh
from tests.support.distributed import run_distributed
from tests.unit.attention.support import (
    CONFIGS,
    HEAD_DIM,
    RICH_LAYOUT,
    TEXT_ONLY_LAYOUT,
    Problem,
    make_problem,
)
from tests.unit.parallel.context.test_supported import SERVED

# With room for as many tokens on any of four ranks; samples whose images are on several, on one.
LAYOUT = replace(RICH_LAYOUT, visual_budget=32)
ONE_IMAGE = TokenLayout((3, 6), (ImageSpan(1, 2, (2, 3)),), 24, 12)
TEXT_ONLY = replace(TEXT_ONLY_LAYOUT, visual_budget=8)
LAYOUTS = {"rich": LAYOUT, "one image": ONE_IMAGE, "text": TEXT_ONLY}
NAMES = [*sorted(SERVED), "inherit", "inherit_sigmoid", "inherit_cascade", "inherit_naavit"]


def _own(problem: Problem, share: ContextShare) -> Problem:
    """What a rank has of a problem."""
    inputs = [share.take(x.detach()).requires_grad_() for x in problem.inputs]
    cos, sin = (share.take(table) for table in problem.rotary)
    gate = None if problem.gate is None else problem.gate.detach().clone().requires_grad_()
    return Problem(*inputs, (cos, sin), share.take(problem.grad_out), gate)


def _text_output(
    problem: Problem, layout: TokenLayout, config: AttentionConfig, elsewhere: Any, backend: str
) -> Tensor:
    """Attention of text tokens, with softcap and window; what a cascade reads apart is added."""
    plan = plan_attention(layout, config, window=3)
    softcap = 1.5 if backend == "math" else None
    arguments = (problem.query[plan.scored_tokens[0] :], problem.key, problem.value, plan)
    options: dict[str, Any] = {
        "score_function": ScoreFunction(HEAD_DIM**-0.5, softcap),
        "backend": select_backend(backend, "cpu", torch.float64, HEAD_DIM),
        "elsewhere": elsewhere,
    }
    out = attend_scored_tokens(*arguments, problem.rotary, gate=problem.gate, **options)
    if config.merge == "cascade":
        out = out + attend_images(*arguments, problem.rotary, **options)
    return out


def _run(
    problem: Problem, layout: TokenLayout, config: AttentionConfig, elsewhere: Any, backend: str
) -> list[Tensor]:
    out = _text_output(problem, layout, config, elsewhere, backend)
    shared = out if elsewhere is None else share_gradient(out, elsewhere.exchange.ranks)
    gradients = torch.autograd.grad(
        shared, problem.differentiable, problem.grad_out[layout.visual_budget :]
    )
    return [out.detach(), *gradients]


def _on_a_rank(cases: Sequence[tuple[str, str, str]]) -> list[list[Tensor]]:
    exchange = ContextExchange(dist.group.WORLD)
    results = []
    for name, pack, backend in cases:
        whole, config = LAYOUTS[pack], CONFIGS[name]
        share = share_of(whole, exchange.rank, exchange.ranks)
        problem = _own(make_problem(whole, config), share)
        elsewhere = ImagesOfAllRanks(exchange)
        results.append(_run(problem, share.layout, config, elsewhere, backend))
    return results


CASES = [(name, pack, "math") for name in NAMES for pack in LAYOUTS]
CASES += [("dattn", "rich", "cpu_flash"), ("ee_mllm", "rich", "cpu_flash")]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_equal_one_process(ranks: int) -> None:
    by_rank = run_distributed(_on_a_rank, ranks, CASES)
    for index, (name, pack, backend) in enumerate(CASES):
        whole, config = LAYOUTS[pack], CONFIGS[name]
        problem = make_problem(whole, config)
        expected = _run(problem, whole, config, None, backend)
        results = [result[index] for result in by_rank]
        shares = [share_of(whole, rank, ranks) for rank in range(ranks)]
        # Query, key and value: what every rank has of text adds up, images are on one.
        found: list[Tensor] = [results[0][0]]
        for place in (1, 2, 3):
            total = torch.zeros_like(expected[place])
            for share, result in zip(shares, results, strict=True):
                numbers = share.take(torch.arange(1, whole.num_tokens + 1))
                valid = numbers > 0
                total.index_add_(0, numbers[valid] - 1, result[place][valid])
            found.append(total)
        if problem.gate is not None:
            found.append(sum(result[4] for result in results))
        for result in results:
            assert torch.equal(result[0], results[0][0]), "text must be the same on all ranks"
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0, msg=f"{name} {pack}")


def test_tokens_that_see_no_image_have_no_share() -> None:
    lses = torch.tensor([[[0.0], [-torch.inf], [-torch.inf]], [[0.0], [1.0], [-torch.inf]]])
    for rank, expected in enumerate(([0.5, 0.0, 0.0], [0.5, 1.0, 0.0])):
        weight, joint = weigh(lses, rank)
        assert weight.flatten().tolist() == expected
        assert joint[2].item() == -torch.inf
    lses[0, 2] = torch.nan
    assert weigh(lses, 0)[0][2].isnan().all(), "what a kernel got wrong is not hidden"


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in SERVED])
def test_what_is_refused_has_visual_queries(preset: str) -> None:
    """Negative control: the list above is not longer than it could be."""
    assert PRESETS[preset].scores_visual_tokens

"""What is compiled on CUDA: the graphs are right, few, and not needed.

The compiler runs here without its code generator ("aot_eager"): what it captures is executed by
torch's own operations. Kernels of a GPU are judged in tests/gpu.
"""

import logging
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from megatron_dattn.attention import PRESETS, gather
from megatron_dattn.attention.backends.select import select_backend
from megatron_dattn.attention.layout import TokenLayout
from tests.unit.attention.support import (
    RICH_LAYOUT,
    TEXT_ONLY_LAYOUT,
    make_problem,
    run_fast,
    run_oracle,
)

# The same kinds of samples and other numbers of tokens.
LONGER = TokenLayout((7, 4), (), visual_budget=3, text_budget=13, prompt_lengths=(2, 2))
LAYOUTS = [RICH_LAYOUT, TEXT_ONLY_LAYOUT, LONGER]


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Compiles for CPU tensors as for those of a GPU; lists the graphs."""
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return aot_eager(graph, inputs)

    @cache
    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)

    monkeypatch.setattr(gather, "_is_cuda", lambda values: True)
    monkeypatch.setattr(gather, "_compiled", compiled)
    torch._dynamo.reset()
    # The CPU runtime, which tests of models switch on, lets no compiled function run compiled.
    with torch.compiler.set_stance("default"):
        yield graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("preset", ["dattn", "s_attn", "dattn_tanh", "yopo"])
def test_compiled_graphs_equal_the_oracle(preset: str, as_on_cuda: list[str]) -> None:
    backend = select_backend("math", "cpu", torch.float64, 8)
    for layout in LAYOUTS:
        problem = make_problem(layout, PRESETS[preset])
        actual = run_fast(problem, layout, PRESETS[preset], backend)
        expected = run_oracle(problem, layout, PRESETS[preset])
        for got, exact in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, exact, atol=1e-12, rtol=0)
    assert as_on_cuda


def test_other_numbers_of_tokens_need_no_other_graphs(as_on_cuda: list[str]) -> None:
    backend = select_backend("math", "cpu", torch.float64, 8)

    def graphs_after(layout: TokenLayout) -> int:
        problem = make_problem(layout, PRESETS["dattn"])
        run_fast(problem, layout, PRESETS["dattn"], backend)
        return len(as_on_cuda)

    assert graphs_after(TEXT_ONLY_LAYOUT) == graphs_after(LONGER) > 0


@gather.fused
def _doubled(values: Tensor) -> Tensor:
    return values * 2


def test_a_cpu_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "_compiled", lambda function: pytest.fail("compiled"))
    assert _doubled(torch.ones(3)).tolist() == [2, 2, 2]


def test_a_compiler_that_does_not_work_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    def broken(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            attempts.append(function)
            raise torch._dynamo.exc.TorchDynamoException("Cannot find a working triton\nand more")

        return call

    monkeypatch.setattr(gather, "_is_cuda", lambda values: True)
    monkeypatch.setattr(gather, "_compiled", broken)
    monkeypatch.setattr(gather, "_failures", [])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert _doubled(torch.ones(2)).tolist() == [2, 2]
    assert len(attempts) == len(caplog.records) == 1
    assert "TorchDynamoException: Cannot find a working triton" in caplog.text


def test_other_errors_are_not_taken_for_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gather, "_is_cuda", lambda values: True)
    monkeypatch.setattr(gather, "_compiled", lambda function: out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        _doubled(torch.ones(2))


def test_packs_of_many_forms_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own limit of graphs for one function is 8; behind it nothing would be compiled."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return aot_eager(graph, inputs)

    def add_up(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).sum(0)

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    with torch.compiler.set_stance("default"):
        compiled = gather._compiled.__wrapped__(add_up)
        for number in range(1, 13):
            assert torch.equal(compiled([torch.ones(3)] * number), torch.full((3,), number))
    torch._dynamo.reset()
    assert len(graphs) == 12

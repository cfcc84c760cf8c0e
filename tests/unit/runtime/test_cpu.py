"""The CPU runtime: inert where CUDA exists, idempotent, complete, narrow."""

import ast
import importlib
import logging
import re
from pathlib import Path

import megatron.core
import pytest
import torch
from megatron.core.optimizer import clip_grads

from megatron_dattn.runtime import cpu
from megatron_dattn.runtime.cpu import cpu_runtime_active, enable_cpu_runtime
from tests.support.distributed import run_distributed

# Modules with the literal that the CPU runtime leaves alone, by reason. They raise torch's own
# error if somebody comes there without a GPU.
NEEDS_A_GPU = re.compile(
    r"megatron\.core\.("
    r"inference\.|distributed\.fsdp\.|ssm\.|export\.|post_training|extensions\.|resharding\."
    r"|fp8_utils$|energy_monitor$|transformer\.cuda_graphs$|full_cuda_graph$|nccl_allocator$"
    r"|pipeline_parallel\.(fine_grained_activation_offload|hybrid_cp_schedule|utils)$"
    r"|optimizer\.cpu_offloading\.|transformer\.moe\.|fusions\.|models\.multimodal\."
    r"|distributed\.torch_fully_sharded_data_parallel$|transformer\.fsdp_dtensor_checkpoint$"
    # Of 0.19: other models, Muon's optimizer, and what provokes faults on purpose.
    r"|models\.(mimo|hybrid)\.|optimizer\.layer_wise_optimizer$|fault_injector$)"
)
# Arguments that name CUDA without making a tensor: autocast, generators' defaults, torch.device
# in functions that the runtime replaces.
NO_TENSOR = {
    "megatron.core.pipeline_parallel.combined_1f1b",
    "megatron.core.tensor_parallel.layers",
}
REDIRECTED_OTHERWISE = {"megatron.core.tensor_parallel.random"}

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU runtime is off with CUDA")


def snapshot() -> list[object]:
    """What `enable_cpu_runtime` would replace, or would replace again."""
    return [
        torch.cuda.current_device,
        torch.cuda.synchronize,
        torch.cuda.get_rng_state,
        torch.Tensor.cuda,
        torch.Tensor.type,
        torch.nn.Module.cuda,
        torch.zeros,
        clip_grads.torch,
        megatron.core.optimizer.Adam,
    ]


def test_inert_where_cuda_exists(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "_active", False)
    before = snapshot()
    with caplog.at_level(logging.INFO, logger=cpu.__name__):
        enable_cpu_runtime()
    assert [new is old for new, old in zip(snapshot(), before, strict=True)] == [True] * len(before)
    assert not cpu_runtime_active()
    assert caplog.messages == ["CUDA is available: the CPU runtime stays off"]


@on_cpu
def test_announces_itself_once(caplog: pytest.LogCaptureFixture) -> None:
    enable_cpu_runtime()
    assert cpu_runtime_active()
    before = snapshot()
    with caplog.at_level(logging.INFO, logger=cpu.__name__):
        enable_cpu_runtime()
    assert caplog.messages == []
    assert [new is old for new, old in zip(snapshot(), before, strict=True)] == [True] * len(before)


def announce() -> list[str]:
    """The runtime's log lines, switched on for the first time as far as it knows."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    cpu.logger.addHandler(handler)
    cpu.logger.setLevel(logging.INFO)
    cpu._active = False
    enable_cpu_runtime()
    enable_cpu_runtime()
    return messages


@on_cpu
def test_one_log_line() -> None:
    (message,) = run_distributed(announce, 1)[0]
    assert "no CUDA device" in message
    assert "gloo" in message


@on_cpu
def test_every_cuda_literal_of_megatron_core_is_known() -> None:
    """A new megatron-core that names CUDA in a new place must not surprise a user."""
    root = Path(megatron.core.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if not re.search(r"""['"]cuda(:0)?['"]""", text):
            continue
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        values = [v for c in calls for v in [*c.args, *(k.value for k in c.keywords)]]
        if any(isinstance(v, ast.Constant) and v.value in ("cuda", "cuda:0") for v in values):
            found.add("megatron.core." + ".".join(path.relative_to(root).with_suffix("").parts))
    unknown = {
        name
        for name in found - set(cpu.MODULES_WITH_CUDA_LITERALS) - NO_TENSOR - REDIRECTED_OTHERWISE
        if not NEEDS_A_GPU.match(name)
    }
    assert unknown == set()
    # mapping.py takes the literal as an argument; every other name on the list still has one.
    stale = set(cpu.MODULES_WITH_CUDA_LITERALS) - found
    assert stale == {"megatron.core.dist_checkpointing.mapping"}


@on_cpu
@pytest.mark.parametrize("name", cpu.MODULES_WITH_CUDA_LITERALS)
def test_factories_of_redirected_modules_make_host_tensors(name: str) -> None:
    enable_cpu_runtime()
    redirected = importlib.import_module(name).torch
    for device in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)):
        assert redirected.zeros(2, device=device).device.type == "cpu"
    assert redirected.empty_like(torch.ones(2), device="cuda").device.type == "cpu"
    assert redirected.zeros(2, device="meta").device.type == "meta"
    assert redirected.float32 is torch.float32
    assert redirected.matmul is torch.matmul


@on_cpu
def test_everybody_else_still_gets_torchs_error() -> None:
    enable_cpu_runtime()
    # Builds without CUDA name CUDA, those with it the driver.
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA|nvidia"):
        torch.cuda.get_device_properties(0)
    assert not torch.cuda.is_available()


@on_cpu
def test_type_names_are_true_outside_megatron_cores_optimizer() -> None:
    enable_cpu_runtime()
    tensor = torch.zeros(1)
    assert tensor.type() == "torch.FloatTensor"
    assert tensor.type(torch.float64).dtype == torch.float64
    # As if called from there.
    seen = eval("tensor.type()", {"tensor": tensor, "__name__": clip_grads.__name__})
    assert seen == "torch.cuda.FloatTensor"


@on_cpu
def test_host_meanings() -> None:
    enable_cpu_runtime()
    tensor, module = torch.ones(2), torch.nn.Linear(2, 2)
    assert tensor.cuda() is tensor
    assert tensor.cuda(torch.cuda.current_device(), non_blocking=True) is tensor
    assert module.cuda() is module
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
    assert 1e7 < torch.cuda.memory_allocated() <= torch.cuda.max_memory_allocated()
    torch.cuda.synchronize()
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(2)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(2), drawn)


@on_cpu
def test_compiled_functions_run_eagerly() -> None:
    enable_cpu_runtime()
    from megatron.core.activations import fast_gelu

    rows = torch.randn(3, 4)
    expected = torch.nn.functional.gelu(rows, approximate="tanh")
    torch.testing.assert_close(fast_gelu(rows), expected, rtol=1e-5, atol=1e-6)
    assert not torch._dynamo.utils.counters["frames"]

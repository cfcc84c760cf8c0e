"""The bookkeeping of the ragged flash backends, on stand-ins that keep the kernels' conventions."""

import inspect
from typing import Any

import pytest
import torch

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.backends import cuda_flash, flash_attn2, flash_attn3
from megatron_dattn.attention.backends.base import Backend, ScoreFunction
from megatron_dattn.attention.backends.cuda_flash import CudaFlashBackend
from megatron_dattn.attention.backends.flash_attn2 import FlashAttn2Backend
from megatron_dattn.attention.backends.flash_attn3 import FlashAttn3Backend
from megatron_dattn.attention.backends.select import select_backend
from megatron_dattn.attention.plan.index import TokenIndex
from megatron_dattn.attention.plan.parts import Part, cu_seqlens
from megatron_dattn.errors import UserError
from tests.unit.attention.backends import varlen_kernels
from tests.unit.attention.support import (
    CONFIGS,
    RICH_LAYOUT,
    TEXT_ONLY_LAYOUT,
    assert_close_norm,
    make_problem,
    run_fast,
    run_oracle,
)


class _Wrapped:
    """A function as torch.library.custom_op hands it out: its signature names no argument."""

    def __init__(self, function: Any) -> None:
        self._init_fn = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._init_fn(*args, **kwargs)


def _wrapped(module: Any) -> Any:
    return type(module)(**{name: _Wrapped(function) for name, function in vars(module).items()})


KERNELS = ["cuda_flash", *varlen_kernels.MODULES, "flash_attn3 main, wrapped"]
WITH_SOFTCAP = KERNELS[1:]


def make_backend(kernel: str, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A backend over its stand-in."""
    if kernel == "cuda_flash":
        monkeypatch.setattr(cuda_flash, "_forward", varlen_kernels.aten_forward)
        monkeypatch.setattr(cuda_flash, "_backward", varlen_kernels.aten_backward)
        return CudaFlashBackend()
    module = varlen_kernels.MODULES[kernel.removesuffix(", wrapped")]
    if kernel.endswith("wrapped"):
        module = _wrapped(module)
    if kernel.startswith("flash_attn2"):
        monkeypatch.setattr(flash_attn2, "_load", lambda: module)
        return FlashAttn2Backend()
    monkeypatch.setattr(flash_attn3, "_load", lambda: module)
    return FlashAttn3Backend()


@pytest.fixture(params=KERNELS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    return make_backend(request.param, monkeypatch)


@pytest.fixture(params=WITH_SOFTCAP)
def capping_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    return make_backend(request.param, monkeypatch)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("layout", [RICH_LAYOUT, TEXT_ONLY_LAYOUT], ids=["rich", "text-only"])
def test_equals_the_oracle(backend: Backend, layout: Any, preset: str, group: int) -> None:
    config = PRESETS[preset]
    problem = make_problem(layout, config, group=group)
    actual = run_fast(problem, layout, config, backend)
    for got, expected in zip(actual, run_oracle(problem, layout, config), strict=True):
        # A few hundred float64 roundings of numbers of order 1 to 10.
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("preset", ["s_attn", "dattn", "dattn_tanh"])
def test_float32_stays_near_the_oracle(backend: Backend, preset: str) -> None:
    """Nothing in between falls back to half precision."""
    config = PRESETS[preset]
    problem = make_problem(RICH_LAYOUT, config, torch.float32)
    actual = run_fast(problem, RICH_LAYOUT, config, backend)
    for got, expected in zip(actual, run_oracle(problem, RICH_LAYOUT, config), strict=True):
        # 6e-8 per rounding, logits up to 10, sums of some ten terms.
        assert_close_norm(got, expected, problem.grad_out, 1e-5)


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("name", ["s_attn", "dattn", "frozen", "inherit"])
def test_the_window_is_the_kernels(backend: Backend, name: str, window: int) -> None:
    config = CONFIGS[name]
    problem = make_problem(RICH_LAYOUT, config)
    actual = run_fast(problem, RICH_LAYOUT, config, backend, window=window)
    exact = run_oracle(problem, RICH_LAYOUT, config, window=window)
    for got, expected in zip(actual, exact, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("preset", ["s_attn", "dattn", "dattn_sigmoid"])
def test_the_softcap_is_the_kernels(
    capping_backend: Backend, preset: str, window: int | None
) -> None:
    config, rules = PRESETS[preset], {"softcap": 1.5, "window": window}
    problem = make_problem(RICH_LAYOUT, config)
    actual = run_fast(problem, RICH_LAYOUT, config, capping_backend, **rules)
    for got, expected in zip(
        actual, run_oracle(problem, RICH_LAYOUT, config, **rules), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("key_lengths", "without"), [((0, 2), [0, 1]), ((0, 0), [0, 1, 2])])
def test_tokens_without_keys_report_minus_infinity(
    backend: Backend, key_lengths: tuple[int, int], without: list[int]
) -> None:
    part = Part(
        "T2V", TokenIndex(3), TokenIndex(sum(key_lengths)), (2, 1), key_lengths, causal=False,
        rotary=False, query_cu_seqlens=cu_seqlens((2, 1)), key_cu_seqlens=cu_seqlens(key_lengths),
    )  # fmt: skip
    query, key, value = (torch.randn(n, 4, 8) for n in (3, sum(key_lengths), sum(key_lengths)))
    out, lse = backend.forward(query, key, value, part, ScoreFunction(1.0))
    assert torch.isneginf(lse).all(dim=1).nonzero().flatten().tolist() == without
    assert torch.isfinite(lse).all(dim=1).sum() == 3 - len(without)
    assert not out[without].any()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("operation", ["_forward", "_backward"])
def test_calls_fit_the_operators_of_this_torch(
    operation: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their schemas are there without CUDA; torch's releases differ in what they end with."""
    overload = getattr(cuda_flash, operation).default
    arguments = [
        inspect.Parameter(
            a.name,
            inspect.Parameter.KEYWORD_ONLY if a.kwarg_only else inspect.Parameter.POSITIONAL_ONLY,
            default=a.default_value if a.has_default_value() else inspect.Parameter.empty,
        )
        for a in overload._schema.arguments
    ]
    signature, stand_in = inspect.Signature(arguments), getattr(varlen_kernels, "aten" + operation)
    backend = make_backend("cuda_flash", monkeypatch)

    def bound(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        bound_calls.append(operation)
        return stand_in(*args, **kwargs)

    bound_calls: list[str] = []
    monkeypatch.setattr(cuda_flash, operation, bound)
    problem = make_problem(RICH_LAYOUT, PRESETS["dattn"])
    run_fast(problem, RICH_LAYOUT, PRESETS["dattn"], backend, window=window)
    assert bound_calls


BACKENDS = {backend.name: backend for backend in
            (CudaFlashBackend(), FlashAttn2Backend(), FlashAttn3Backend())}  # fmt: skip


@pytest.fixture
def installed(trials_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with everything."""
    monkeypatch.setattr(cuda_flash, "_forward", varlen_kernels.aten_forward)
    monkeypatch.setattr(cuda_flash, "_backward", varlen_kernels.aten_backward)
    monkeypatch.setattr(flash_attn2, "flash_attn_version", lambda: "2.8.3.post1")
    monkeypatch.setattr(flash_attn2, "_load", lambda: varlen_kernels.MODULES["flash_attn2 main"])
    monkeypatch.setattr(flash_attn3, "has_flash_attn3", lambda: True)
    monkeypatch.setattr(flash_attn3, "_load", lambda: varlen_kernels.MODULES["flash_attn3 main"])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return monkeypatch


@pytest.mark.parametrize("name", BACKENDS)
def test_without_a_cuda_device_it_says_so(name: str, installed: pytest.MonkeyPatch) -> None:
    reason = BACKENDS[name].unsupported(torch.device("cpu"), torch.bfloat16, 64)
    assert reason == "it needs a CUDA device, not cpu"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.bfloat16, 128, None),
        (torch.float16, 256, None),
        (torch.float32, 64, "bfloat16 or float16, not torch.float32"),
        (torch.bfloat16, 264, "head_dim 264"),
        (torch.bfloat16, 36, "head_dim 36"),
    ],
)
def test_what_tensors_it_supports(
    name: str,
    installed: pytest.MonkeyPatch,
    dtype: torch.dtype,
    head_dim: int,
    reason: str | None,
) -> None:
    actual = BACKENDS[name].unsupported(torch.device("cuda"), dtype, head_dim)
    assert (actual is None) if reason is None else (actual is not None and reason in actual)


@pytest.mark.parametrize(
    ("name", "capability", "reason"),
    [
        ("cuda_flash", (8, 0), None),
        ("cuda_flash", (7, 5), "older than compute capability 8.0"),
        ("flash_attn2", (8, 0), None),
        ("flash_attn2", (12, 0), None),
        ("flash_attn2", (7, 5), "older than compute capability 8.0"),
        ("flash_attn3", (9, 0), None),
        ("flash_attn3", (8, 9), "older than compute capability 9.0"),
        ("flash_attn3", (10, 0), "newer than compute capability 9.x"),
    ],
)
def test_what_gpus_it_supports(
    name: str, capability: tuple[int, int], reason: str | None, installed: pytest.MonkeyPatch
) -> None:
    installed.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    actual = BACKENDS[name].unsupported(torch.device("cuda"), torch.bfloat16, 64)
    assert (actual is None) if reason is None else (actual is not None and reason in actual)


@pytest.mark.parametrize("version", ["2.6.3", "2.0", "1.0.9", "4.0.0b5"])
def test_other_versions_of_flash_attn_are_refused(
    version: str, installed: pytest.MonkeyPatch
) -> None:
    installed.setattr(flash_attn2, "flash_attn_version", lambda: version)
    with pytest.raises(UserError, match=f"'flash_attn2' cannot be used: flash-attn {version} is "):
        select_backend("flash_attn2", "cuda", torch.bfloat16, 64)
    installed.setattr(flash_attn3, "has_flash_attn3", lambda: False)
    assert select_backend("auto", "cuda", torch.bfloat16, 64).name == "cuda_flash"


def test_missing_packages_are_named(installed: pytest.MonkeyPatch) -> None:
    installed.setattr(flash_attn2, "flash_attn_version", lambda: None)
    installed.setattr(flash_attn3, "has_flash_attn3", lambda: False)
    with pytest.raises(UserError, match=r"'flash_attn2'.* flash-attn is not installed"):
        select_backend("flash_attn2", "cuda", torch.bfloat16, 64)
    with pytest.raises(UserError, match=r"'flash_attn3'.* flash_attn_interface, is not installed"):
        select_backend("flash_attn3", "cuda", torch.bfloat16, 64)


@pytest.mark.parametrize("module", [flash_attn2, flash_attn3])
def test_a_package_built_for_another_torch_is_passed_over(
    module: Any, installed: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        raise ImportError("undefined symbol: _ZN3c10")

    installed.setattr(module, "_load", broken)
    name = module.__name__.rsplit(".", 1)[-1]
    with pytest.raises(UserError, match=f"'{name}'.* does not load: undefined symbol"):
        select_backend(name, "cuda", torch.bfloat16, 64)
    assert select_backend("auto", "cuda", torch.bfloat16, 64).name != name


def test_the_newest_kernel_is_preferred(installed: pytest.MonkeyPatch) -> None:
    def chosen(softcap: float | None = None) -> str:
        select_backend.cache_clear()
        return select_backend("auto", "cuda", torch.bfloat16, 64, softcap=softcap).name

    assert chosen() == chosen(50.0) == "flash_attn3"
    installed.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert chosen() == chosen(50.0) == "flash_attn2"
    installed.setattr(flash_attn2, "flash_attn_version", lambda: None)
    assert chosen() == "cuda_flash"
    assert chosen(50.0) == "math"

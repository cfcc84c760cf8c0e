"""A kernel that is installed and does not run: passed over by "auto", refused by name."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dattn.attention.backends import flash_attn3, select
from megatron_dattn.attention.backends.select import BACKENDS, select_backend
from megatron_dattn.attention.backends.trial import trial_failure
from megatron_dattn.errors import ConfigError
from tests.unit.attention.backends import varlen_kernels

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["cpu_flash", "math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_runs_here_passes(name: str, dtype: torch.dtype) -> None:
    assert trial_failure(BACKENDS[name], CPU, dtype, 32) is None


def test_the_trial_leaves_random_states_alone() -> None:
    before = torch.get_rng_state()
    trial_failure(BACKENDS["math"], CPU, torch.float32, 32)
    assert torch.equal(torch.get_rng_state(), before)


def _no_forward(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no kernel image is available for execution on the device\nand more")


def _no_backward(dout: Any) -> Any:
    raise AssertionError


@pytest.fixture
def broken(trials_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Hopper machine whose flash-attn 3 supports the tensors and fails in the forward pass."""
    whole = varlen_kernels.MODULES["flash_attn3 main"]
    module = SimpleNamespace(**{**vars(whole), "_flash_attn_forward": _no_forward})
    monkeypatch.setattr(flash_attn3, "_load", lambda: module)
    for backend in BACKENDS.values():
        usable = None if backend.name in ("flash_attn3", "math") else "not here"
        monkeypatch.setattr(backend, "unsupported", lambda *_, usable=usable: usable)
    return monkeypatch


def test_auto_takes_the_next_one_with_one_warning(
    broken: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert select_backend("auto", "cuda", torch.bfloat16, 64).name == "math"
    assert caplog.messages == [
        "attention backend flash_attn3 is passed over: a tiny forward and backward pass failed, "
        "RuntimeError: no kernel image is available for execution on the device"
    ]


def test_a_named_one_is_refused_with_the_reason(broken: pytest.MonkeyPatch) -> None:
    words = "'flash_attn3' cannot be used: a tiny forward and backward pass failed, RuntimeError"
    with pytest.raises(ConfigError, match=words):
        select_backend("flash_attn3", "cuda", torch.bfloat16, 64)


def test_the_backward_pass_counts_too(broken: pytest.MonkeyPatch) -> None:
    """Here of a release older than the arguments over segments."""
    whole = varlen_kernels.MODULES["flash_attn3 main"]
    module = SimpleNamespace(**{**vars(whole), "_flash_attn_backward": _no_backward})
    broken.setattr(flash_attn3, "_load", lambda: module)
    failure = trial_failure(BACKENDS["flash_attn3"], CPU, torch.bfloat16, 64)
    assert failure is not None
    assert "TypeError: _no_backward() got an unexpected keyword argument" in failure


def test_a_cpu_needs_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "trial_failure", lambda *_: pytest.fail("tried"))
    assert select_backend("auto", "cpu", torch.float32, 48).name == "cpu_flash"
    assert select_backend("math", "cuda", torch.float32, 48).name == "math"

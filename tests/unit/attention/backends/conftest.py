"""Kernels that a test installs or removes are looked for anew, and tried here: on the CPU."""

from collections.abc import Iterator

import pytest
import torch

from megatron_dattn.attention.backends import select, trial
from megatron_dattn.attention.backends.select import select_backend


@pytest.fixture(autouse=True)
def _nothing_selected() -> Iterator[None]:
    select_backend.cache_clear()
    yield
    select_backend.cache_clear()


@pytest.fixture
def trials_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial of a "CUDA device" runs on this CPU, on the stand-ins of the kernels."""

    def failure(backend, device, dtype, head_dim, softcap=None):
        return trial.trial_failure(backend, torch.device("cpu"), dtype, head_dim, softcap)

    monkeypatch.setattr(select, "trial_failure", failure)

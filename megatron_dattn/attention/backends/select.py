"""Which backend runs: the best one for the device and dtype, or the one that was asked for.

On a CUDA device it has to pass a tiny trial first (`trial.py`).
"""

import logging
from functools import cache

import torch

from megatron_dattn.attention.backends.base import Backend
from megatron_dattn.attention.backends.cpu_flash import CpuFlashBackend
from megatron_dattn.attention.backends.cuda_flash import CudaFlashBackend
from megatron_dattn.attention.backends.flash_attn2 import FlashAttn2Backend
from megatron_dattn.attention.backends.flash_attn3 import FlashAttn3Backend
from megatron_dattn.attention.backends.math import MathBackend
from megatron_dattn.attention.backends.trial import trial_failure
from megatron_dattn.errors import ConfigError

logger = logging.getLogger(__name__)

# In order of preference; the last one supports everything and needs no trial.
_PREFERENCE: tuple[Backend, ...] = (
    FlashAttn3Backend(),
    FlashAttn2Backend(),
    CudaFlashBackend(),
    CpuFlashBackend(),
    MathBackend(),
)
BACKENDS = {backend.name: backend for backend in _PREFERENCE}


@cache  # every micro-batch asks for that of its model
def select_backend(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    softcap: float | None = None,
) -> Backend:
    """The backend called `name`, or with "auto" the first that supports such tensors and runs.

    Raises ConfigError when the named one is unknown or cannot run them. Every choice is announced
    once through logging, with a warning for each one that "auto" passes over after its trial.
    """
    device = torch.device(device)
    if name == "auto":
        backend = _first_that_runs(device, dtype, head_dim, softcap)
    elif name in BACKENDS:
        backend = BACKENDS[name]
        reason = backend.unsupported(device, dtype, head_dim, softcap)
        if reason is None:
            reason = _trial(backend, device, dtype, head_dim, softcap)
        if reason is not None:
            raise ConfigError(f"attention backend {name!r} cannot be used: {reason}; choose 'auto'")
    else:
        raise ConfigError(
            f"unknown attention backend {name!r}; choose auto or one of {', '.join(BACKENDS)}"
        )
    _announce(backend.name, device.type, dtype, head_dim)
    return backend


def _first_that_runs(
    device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None
) -> Backend:
    for backend in _PREFERENCE[:-1]:
        if backend.unsupported(device, dtype, head_dim, softcap) is not None:
            continue
        failure = _trial(backend, device, dtype, head_dim, softcap)
        if failure is None:
            return backend
        logger.warning("attention backend %s is passed over: %s", backend.name, failure)
    return _PREFERENCE[-1]


def _trial(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    softcap: float | None,
) -> str | None:
    """Why the backend does not run, where that depends on the machine."""
    if device.type != "cuda" or backend is _PREFERENCE[-1]:
        return None
    failure = trial_failure(backend, device, dtype, head_dim, softcap)
    return failure and f"a tiny forward and backward pass failed, {failure}"


@cache
def _announce(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> None:
    logger.info("attention backend: %s (%s, %s, head_dim %d)", name, device_type, dtype, head_dim)

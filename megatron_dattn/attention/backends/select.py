"""Which backend runs: the best one for the device and dtype, or the one that was asked for."""

import logging
from functools import cache

import torch

from megatron_dattn.attention.backends.base import Backend
from megatron_dattn.attention.backends.cpu_flash import CpuFlashBackend
from megatron_dattn.attention.backends.cuda_flash import CudaFlashBackend
from megatron_dattn.attention.backends.flash_attn2 import FlashAttn2Backend
from megatron_dattn.attention.backends.flash_attn3 import FlashAttn3Backend
from megatron_dattn.attention.backends.math import MathBackend
from megatron_dattn.errors import UserError

logger = logging.getLogger(__name__)

# In order of preference; the last one supports everything.
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
    """The backend called `name`, or with "auto" the first that supports such tensors.

    Raises UserError when the named one is unknown or cannot run them. Every choice is announced
    once through logging.
    """
    device = torch.device(device)
    if name == "auto":
        backend = next(
            b for b in BACKENDS.values() if b.unsupported(device, dtype, head_dim, softcap) is None
        )
    elif name in BACKENDS:
        backend = BACKENDS[name]
        reason = backend.unsupported(device, dtype, head_dim, softcap)
        if reason is not None:
            raise UserError(f"attention backend {name!r} cannot be used: {reason}; choose 'auto'")
    else:
        raise UserError(
            f"unknown attention backend {name!r}; choose auto or one of {', '.join(BACKENDS)}"
        )
    _announce(backend.name, device.type, dtype, head_dim)
    return backend


@cache
def _announce(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> None:
    logger.info("attention backend: %s (%s, %s, head_dim %d)", name, device_type, dtype, head_dim)

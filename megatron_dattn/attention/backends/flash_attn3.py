"""Attention by flash-attn 3, the kernels for Hopper GPUs, with softcap.

The package installs one module, `flash_attn_interface`. It is built from source, and its releases
differ in names and defaults of the raw operations' arguments, so both are read off the signature.
Before 2.7.3 there was no raw operation over segments.
"""

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megatron_dattn.attention.backends.varlen import (
    RaggedScores,
    VarlenBackend,
    empty_gradients,
    unsupported_tensors,
)

_MODULE = "flash_attn_interface"


@cache
def has_flash_attn3() -> bool:
    """True if flash-attn 3 is installed."""
    return find_spec(_MODULE) is not None


@cache
def _load() -> Any:
    """The module of the raw operations. Raises ImportError if it was built for another torch."""
    return import_module(_MODULE)


class FlashAttn3Backend(VarlenBackend):
    name = "flash_attn3"

    def unsupported(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        softcap: float | None = None,
    ) -> str | None:
        if not has_flash_attn3():
            return f"flash-attn 3, the module {_MODULE}, is not installed"
        reason = unsupported_tensors(device, dtype, head_dim, capability=9)
        if reason is not None:
            return reason
        if torch.cuda.get_device_capability(device)[0] > 9:
            name = torch.cuda.get_device_name(device)
            return f"{name} is newer than compute capability 9.x, the only one it is written for"
        try:
            _load()
        except ImportError as error:
            return f"flash-attn 3 does not load: {error}"
        return None

    def varlen_forward(
        self, query: Tensor, key: Tensor, value: Tensor, scores: RaggedScores
    ) -> tuple[Tensor, Tensor]:
        tensors = {"q": query, "k": key, "v": value}
        out, lse, *_ = _call(_load()._flash_attn_forward, tensors, scores)
        return out, lse

    def varlen_backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scores: RaggedScores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_query, grad_key, grad_value = empty_gradients(query, key, value)
        tensors = {
            "dout": grad_out,
            "q": query,
            "k": key,
            "v": value,
            "out": out,
            "softmax_lse": lse,
            "dq": grad_query,
            "dk": grad_key,
            "dv": grad_value,
        }
        deterministic = torch.are_deterministic_algorithms_enabled()
        _call(_load()._flash_attn_backward, tensors, scores, deterministic=deterministic)
        return grad_query, grad_key, grad_value


def _call(
    operation: Callable[..., Any], tensors: dict[str, Tensor], scores: RaggedScores, **options: bool
) -> Any:
    """Call a raw operation with what forward and backward are told alike, under this release's
    names."""
    names, required = _signature(operation)
    left, right = scores.window_sides
    arguments: dict[str, Any] = {
        **tensors,
        "cu_seqlens_q": scores.query_cu_seqlens,
        "cu_seqlens_k": scores.key_cu_seqlens,
        "max_seqlen_q": scores.longest_query,
        "max_seqlen_k": scores.longest_key,
        "softmax_scale": scores.function.scale,
        "is_causal" if "is_causal" in names else "causal": scores.causal,
        "softcap": scores.function.softcap or 0.0,  # 0 means none
        **options,
    }
    if "window_size" in names:
        arguments["window_size"] = (left, right)
    else:
        arguments |= {"window_size_left": left, "window_size_right": right}
    # Releases give no defaults to what only inference wants (a cache, pages, rotary tables).
    return operation(**dict.fromkeys(required) | arguments)


@cache
def _signature(operation: Callable[..., Any]) -> tuple[frozenset[str], tuple[str, ...]]:
    """All arguments' names, and of those without a default.

    Of a plain function, or of one that torch has wrapped as a custom operator.
    """
    parameters = inspect.signature(getattr(operation, "_init_fn", operation)).parameters
    required = tuple(name for name, p in parameters.items() if p.default is p.empty)
    return frozenset(parameters), required

"""Attention by the package flash-attn, 2.7 or newer: compute capability 8.0 up, with softcap.

Its raw forward and backward are called, not its autograd function: the backward of a part must get
the merged output and log-sum-exp. Before 2.7 they had other arguments and results.
"""

import re
from functools import cache
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor

from megatron_dattn.attention.backends.varlen import (
    RaggedScores,
    VarlenBackend,
    empty_gradients,
    unsupported_tensors,
)

_MIN_VERSION = (2, 7)


@cache
def flash_attn_version() -> str | None:
    """The version of the package flash-attn; None where it is not installed.

    Asked of the distribution: flash-attn 4 has a module of the same name.
    """
    try:
        return metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return None


def has_flash_attn() -> bool:
    """True if the package flash-attn is installed, in whatever version."""
    return flash_attn_version() is not None


@cache
def _load() -> Any:
    """The module of the raw operations. Raises ImportError if it was built for another torch."""
    return import_module("flash_attn.flash_attn_interface")


class FlashAttn2Backend(VarlenBackend):
    name = "flash_attn2"

    def unsupported(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        softcap: float | None = None,
    ) -> str | None:
        version = flash_attn_version()
        if version is None:
            return "the package flash-attn is not installed"
        if not _MIN_VERSION <= _release(version) < (3, 0):
            return f"flash-attn {version} is not 2.7 or a newer version 2"
        reason = unsupported_tensors(device, dtype, head_dim, capability=8)
        if reason is not None:
            return reason
        try:
            _load()
        except ImportError as error:
            return f"flash-attn {version} does not load: {error}"
        return None

    def varlen_forward(
        self, query: Tensor, key: Tensor, value: Tensor, scores: RaggedScores
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _load()._flash_attn_varlen_forward(
            query, key, value, **_arguments(scores), return_softmax=False
        )
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
        _load()._flash_attn_varlen_backward(
            grad_out,
            query,
            key,
            value,
            out,
            lse,
            grad_query,
            grad_key,
            grad_value,
            **_arguments(scores),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grad_query, grad_key, grad_value


def _release(version: str) -> tuple[int, ...]:
    """(2, 7) of "2.7.4.post1"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _arguments(scores: RaggedScores) -> dict[str, Any]:
    """What forward and backward are told alike."""
    left, right = scores.window_sides
    return {
        "cu_seqlens_q": scores.query_cu_seqlens,
        "cu_seqlens_k": scores.key_cu_seqlens,
        "max_seqlen_q": scores.longest_query,
        "max_seqlen_k": scores.longest_key,
        "dropout_p": 0.0,
        "softmax_scale": scores.function.scale,
        "causal": scores.causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": scores.function.softcap or 0.0,  # 0 means none
        "alibi_slopes": None,
    }

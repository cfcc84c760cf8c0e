"""Kernels that compute one part of the attention, behind one small interface."""

from megatron_dattn.attention.backends.base import Backend
from megatron_dattn.attention.backends.select import select_backend

__all__ = ["Backend", "select_backend"]

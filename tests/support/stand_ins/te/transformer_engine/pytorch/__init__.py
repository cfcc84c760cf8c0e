"""Transformer Engine's part for torch."""

from typing import Any

import torch

from transformer_engine.pytorch import distributed, fp8, ops, optimizers, tensor
from transformer_engine.pytorch.fp8 import fp8_autocast, fp8_model_init
from transformer_engine.pytorch.module import LayerNorm, LayerNormLinear, Linear, RMSNorm

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8",
    "fp8_autocast",
    "fp8_model_init",
    "ops",
    "optimizers",
    "tensor",
]


class _NotForUs(torch.nn.Module):
    def __init__(self, *args: Any, **settings: Any) -> None:
        raise AssertionError(f"no model of ours has a {type(self).__name__}")


class DotProductAttention(_NotForUs):
    pass


class GroupedLinear(_NotForUs):
    pass

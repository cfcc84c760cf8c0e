"""Decomposed Attention: which tokens see which, and the exact attention over them.

Pure tensor mathematics: no process groups, no Megatron, no globals. Read `config.py` for the
choices, `reference.py` for their meaning, `decomposed.py` for the operation.
"""

from megatron_dattn.attention.backends.base import ScoreFunction
from megatron_dattn.attention.backends.select import select_backend
from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.decomposed import decomposed_attention
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.plan.parts import AttentionPlan, plan_attention
from megatron_dattn.attention.positions import rotary_tables, token_positions
from megatron_dattn.attention.presets import PRESETS, get_preset

__all__ = [
    "AttentionConfig",
    "AttentionPlan",
    "ImageSpan",
    "PRESETS",
    "ScoreFunction",
    "TokenLayout",
    "decomposed_attention",
    "get_preset",
    "plan_attention",
    "rotary_tables",
    "select_backend",
    "token_positions",
]

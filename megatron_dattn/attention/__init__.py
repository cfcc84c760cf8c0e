"""Decomposed Attention: which rows see which, and the exact attention over them.

Pure tensor mathematics: no process groups, no Megatron, no globals. Read `config.py` for the
choices, `reference.py` for their meaning, `decomposed.py` for the operation.
"""

from megatron_dattn.attention.backends import Backend, select_backend
from megatron_dattn.attention.config import (
    PRESETS,
    AttentionConfig,
    Positions,
    TextToVisual,
    get_preset,
)
from megatron_dattn.attention.decomposed import (
    attend_scored_rows,
    decomposed_attention,
    diagonal_attention,
)
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.merge import alpha_merge
from megatron_dattn.attention.parts import AttentionPlan, plan_attention
from megatron_dattn.attention.positions import apply_rotary, rotary_tables, row_positions

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "AttentionPlan",
    "Backend",
    "ImageSpan",
    "Positions",
    "TextToVisual",
    "TokenLayout",
    "alpha_merge",
    "apply_rotary",
    "attend_scored_rows",
    "decomposed_attention",
    "diagonal_attention",
    "get_preset",
    "plan_attention",
    "rotary_tables",
    "row_positions",
    "select_backend",
]

"""Decomposed Attention: which rows see which, and the exact attention over them.

Pure tensor mathematics: no process groups, no Megatron, no globals. Read `config.py` for the
choices, `reference.py` for their meaning, `decomposed.py` for the operation.
"""

from megatron_dattn.attention.backends import Backend, select_backend
from megatron_dattn.attention.config import AttentionConfig, Positions, TextToVisual
from megatron_dattn.attention.cost import LayerFlops, LayerSizes, attended_pairs, layer_flops
from megatron_dattn.attention.decomposed import (
    attend_scored_rows,
    decomposed_attention,
    diagonal_attention,
)
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.merge import alpha_merge, weighted_merge
from megatron_dattn.attention.outputs import output_rows
from megatron_dattn.attention.parts import AttentionPlan, plan_attention
from megatron_dattn.attention.positions import apply_rotary, rotary_tables, row_positions
from megatron_dattn.attention.presets import PRESETS, get_preset

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "AttentionPlan",
    "Backend",
    "ImageSpan",
    "LayerFlops",
    "LayerSizes",
    "Positions",
    "TextToVisual",
    "TokenLayout",
    "alpha_merge",
    "apply_rotary",
    "attend_scored_rows",
    "attended_pairs",
    "decomposed_attention",
    "diagonal_attention",
    "get_preset",
    "layer_flops",
    "output_rows",
    "plan_attention",
    "rotary_tables",
    "row_positions",
    "select_backend",
    "weighted_merge",
]

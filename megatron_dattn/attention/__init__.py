"""Decomposed Attention: which tokens see which, and the exact attention over them.

Pure tensor mathematics: no process groups, no Megatron, no globals. Read `config.py` for the
choices, `reference.py` for their meaning, `decomposed.py` for the operation.
"""

from megatron_dattn.attention.attention_maps import (
    ReportInputs,
    ReportPlan,
    alpha_v,
    image_attention,
    plan_report,
)
from megatron_dattn.attention.backends import Backend, select_backend
from megatron_dattn.attention.backends.base import ScoreFunction
from megatron_dattn.attention.config import AttentionConfig, Positions, TextToVisual
from megatron_dattn.attention.decomposed import (
    attend_images,
    attend_scored_tokens,
    decomposed_attention,
    diagonal_attention,
)
from megatron_dattn.attention.layers import LayerRule, layer_rules
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.merge import alpha_merge, weighted_merge
from megatron_dattn.attention.outputs import output_tokens
from megatron_dattn.attention.plan.decode import next_positions, plan_decode_step
from megatron_dattn.attention.plan.parts import AttentionPlan, plan_attention
from megatron_dattn.attention.positions import (
    RotaryScaling,
    apply_rotary,
    rotary_tables,
    token_positions,
)
from megatron_dattn.attention.presets import PRESETS, get_preset
from megatron_dattn.attention.visual_config import VisualTokensConfig, kept_grid, num_shared

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "AttentionPlan",
    "Backend",
    "ImageSpan",
    "LayerRule",
    "Positions",
    "ReportPlan",
    "ScoreFunction",
    "ReportInputs",
    "TextToVisual",
    "TokenLayout",
    "VisualTokensConfig",
    "alpha_merge",
    "RotaryScaling",
    "apply_rotary",
    "attend_images",
    "attend_scored_tokens",
    "decomposed_attention",
    "diagonal_attention",
    "get_preset",
    "image_attention",
    "kept_grid",
    "layer_rules",
    "next_positions",
    "num_shared",
    "output_tokens",
    "plan_attention",
    "plan_decode_step",
    "plan_report",
    "rotary_tables",
    "token_positions",
    "select_backend",
    "alpha_v",
    "weighted_merge",
]

"""Decomposed Attention: which tokens see which, and the exact attention over them.

Pure tensor mathematics: no process groups, no Megatron, no globals. Read `config.py` for the
choices, `reference.py` for their meaning, `decomposed.py` for the operation.
"""

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.presets import PRESETS, get_preset

__all__ = [
    "AttentionConfig",
    "PRESETS",
    "get_preset",
]

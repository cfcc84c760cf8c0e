"""Greedy generation from a run folder's checkpoint, and what an answer looked at."""

from megatron_dattn.inference.generate import Prompt, decode, generate, generate_tokens
from megatron_dattn.inference.load import LoadedModel, load_model
from megatron_dattn.inference.look import Look, look

__all__ = [
    "LoadedModel",
    "Look",
    "Prompt",
    "decode",
    "generate",
    "generate_tokens",
    "load_model",
    "look",
]

"""Greedy generation from a run folder's checkpoint."""

from megatron_dattn.inference.generate import Prompt, generate
from megatron_dattn.inference.load import LoadedModel, load_model

__all__ = ["LoadedModel", "Prompt", "generate", "load_model"]

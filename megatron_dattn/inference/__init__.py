"""Greedy generation from a run folder's checkpoint, and what an answer looked at."""

from megatron_dattn.inference.attention_maps import AttentionMaps, attention_maps
from megatron_dattn.inference.generate import decode, generate, generate_tokens
from megatron_dattn.inference.image_cache import encode_images
from megatron_dattn.inference.load import LoadedModel, load_model
from megatron_dattn.inference.prompt import EncodedImage, Prompt

__all__ = [
    "EncodedImage",
    "LoadedModel",
    "AttentionMaps",
    "Prompt",
    "decode",
    "encode_images",
    "generate",
    "generate_tokens",
    "load_model",
    "attention_maps",
]

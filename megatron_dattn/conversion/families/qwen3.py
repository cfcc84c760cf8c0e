"""Qwen3 (dense, text only): config in our terms.

Its decoder is Llama's with one norm for the queries and one for the keys of every head, and heads
that are 128 wide whatever the hidden size.
"""

from typing import Any

from megatron_dattn.conversion.families import qwen2
from megatron_dattn.conversion.families.decoder import unused_prefixes, write_config
from megatron_dattn.conversion.families.mistral import language_rules
from megatron_dattn.models.config import LanguageConfig

__all__ = [
    "DEFAULTS",
    "MODEL_TYPES",
    "hf_config",
    "language_config",
    "language_rules",
    "unused_prefixes",
]

MODEL_TYPES = ("qwen3",)
# transformers.Qwen3Config's, for fields that config.json leaves out.
DEFAULTS: dict[str, Any] = {**qwen2.DEFAULTS, "head_dim": 128}


def language_config(config: dict[str, Any]) -> LanguageConfig:
    """Translate a config.json.

    Raises:
        CheckpointError: a feature that the training stack lacks.
    """
    found = qwen2.read_config(config, DEFAULTS, refused=("attention_bias",))
    return LanguageConfig(family="qwen3", **found)


def hf_config(language: LanguageConfig) -> dict[str, Any]:
    """The config.json of a language model."""
    return write_config(language, "qwen3")

"""Llama (1 to 3.3, Vicuna): config in our terms.

Its decoder is Mistral's without a sliding window, so the weight map is Mistral's.
"""

from typing import Any

from megatron_dattn.conversion.families.decoder import read_config, unused_prefixes, write_config
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

MODEL_TYPES = ("llama",)
# transformers.LlamaConfig's, for fields that config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}


def language_config(config: dict[str, Any]) -> LanguageConfig:
    """Translate a config.json.

    Raises:
        CheckpointError: a feature that the training stack lacks.
    """
    refused = ("attention_bias", "mlp_bias")
    found = read_config(config, DEFAULTS, refused=refused, activations=("silu",))
    return LanguageConfig(family="llama", **found)


def hf_config(language: LanguageConfig) -> dict[str, Any]:
    """The config.json of a language model."""
    return write_config(language, "llama")

"""Qwen1.5, 2 and 2.5 (text only): config in our terms.

Their decoder is Llama's with biases in the projections of queries, keys and values. The sliding
window that their config.json describes is off in all published models.
"""

from collections.abc import Sequence
from typing import Any

from megatron_dattn.conversion.families import decoder
from megatron_dattn.conversion.families.decoder import unused_prefixes, write_config
from megatron_dattn.conversion.families.mistral import language_rules
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.config import LanguageConfig

__all__ = [
    "DEFAULTS",
    "MODEL_TYPES",
    "hf_config",
    "language_config",
    "language_rules",
    "unused_prefixes",
]

MODEL_TYPES = ("qwen2",)
# transformers.Qwen2Config's, for fields that config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
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
    return LanguageConfig(family="qwen2", **read_config(config, DEFAULTS))


def read_config(
    config: dict[str, Any], defaults: dict[str, Any], refused: Sequence[str] = ()
) -> dict[str, Any]:
    """As `decoder.read_config`, which it calls; no layer may have a window.

    Raises:
        CheckpointError: as there.
    """
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        raise CheckpointError(
            f"layer_types {config['layer_types']} are not supported, only full_attention"
        )
    refused = ("use_sliding_window", *refused)
    return decoder.read_config(config, defaults, refused=refused, activations=("silu",))


def hf_config(language: LanguageConfig) -> dict[str, Any]:
    """The config.json of a language model."""
    return write_config(language, "qwen2")

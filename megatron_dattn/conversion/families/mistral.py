"""Mistral (v0.1 to v0.3, any size): Hugging Face config and weights in our terms.

The decoder's weight map is shared by the families with the same layer, see `llama.py`.
"""

from typing import Any

from megatron_dattn.conversion.families.decoder import (
    attention_and_ffn,
    decoder_rules,
    one_norm,
    read_config,
    unused_prefixes,
    write_config,
)
from megatron_dattn.conversion.families.weight_map import Rule
from megatron_dattn.models.config import LanguageConfig

__all__ = [
    "DEFAULTS",
    "MODEL_TYPES",
    "hf_config",
    "language_config",
    "language_rules",
    "unused_prefixes",
]

MODEL_TYPES = ("mistral",)
# transformers.MistralConfig's, for fields that config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}


def language_config(config: dict[str, Any]) -> LanguageConfig:
    """Translate a config.json.

    Raises:
        CheckpointError: a feature that the training stack lacks.
    """
    found = read_config(config, DEFAULTS, refused=("attention_bias",), activations=("silu",))
    return LanguageConfig(family="mistral", **found)


def hf_config(language: LanguageConfig) -> dict[str, Any]:
    """The config.json of a language model."""
    return write_config(language, "mistral") | {"sliding_window": language.sliding_window}


def language_rules(config: LanguageConfig) -> list[Rule]:
    """Rules for every parameter of the language model (prefix `language_model.`)."""
    return decoder_rules(config, _layer_rules)


def _layer_rules(config: LanguageConfig, ours: str, theirs: str) -> list[Rule]:
    return [
        one_norm(config, f"{ours}.input_layernorm", f"{theirs}.input_layernorm"),
        one_norm(config, f"{ours}.pre_mlp_layernorm", f"{theirs}.post_attention_layernorm"),
        *attention_and_ffn(config, ours, theirs),
    ]

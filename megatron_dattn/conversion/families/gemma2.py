"""Gemma-2 (any size): Hugging Face config and weights in our terms.

Norm weights are stored as Hugging Face stores them: what is added to one.
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
from megatron_dattn.errors import CheckpointError, ConfigError
from megatron_dattn.models.config import LanguageConfig

__all__ = [
    "DEFAULTS",
    "MODEL_TYPES",
    "hf_config",
    "language_config",
    "language_rules",
    "unused_prefixes",
]

MODEL_TYPES = ("gemma2",)
# transformers.Gemma2Config's, for fields that config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
# Our names and theirs in a layer.
_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "pre_mlp_layernorm": "pre_feedforward_layernorm",
    "post_feedforward_layernorm": "post_feedforward_layernorm",
}


def language_config(config: dict[str, Any]) -> LanguageConfig:
    """Translate a config.json.

    Raises:
        CheckpointError: a feature that the training stack lacks.
    """
    refused = ("attention_bias", "use_bidirectional_attention")
    found = read_config(config, DEFAULTS, refused=refused, activations=("gelu_pytorch_tanh",))
    language = LanguageConfig(family="gemma2", **found)
    kinds = config.get("layer_types")
    usual = [
        "full_attention" if layer % 2 else "sliding_attention"
        for layer in range(language.num_hidden_layers)
    ]
    if kinds is not None and kinds != usual:
        raise CheckpointError(
            f"layer_types {kinds} are not supported, only sliding and full attention in turn"
        )
    return language


def hf_config(language: LanguageConfig) -> dict[str, Any]:
    """The config.json of a language model.

    Raises:
        ConfigError: a setting that Hugging Face's Gemma-2 cannot have.
    """
    scalar = language.query_pre_attn_scalar or language.head_dim
    if scalar != int(scalar):
        raise ConfigError(
            f"model.language.query_pre_attn_scalar is {scalar}, Hugging Face's Gemma-2 takes whole "
            "numbers"
        )
    return write_config(language, "gemma2") | {
        "hidden_activation": language.hidden_activation,
        "query_pre_attn_scalar": int(scalar),
        "attn_logit_softcapping": language.attn_logit_softcapping,
        "final_logit_softcapping": language.final_logit_softcapping,
        "sliding_window": language.sliding_window,
    }


def language_rules(config: LanguageConfig) -> list[Rule]:
    """Rules for every parameter of the language model (prefix `language_model.`)."""
    return decoder_rules(config, _layer_rules)


def _layer_rules(config: LanguageConfig, ours: str, theirs: str) -> list[Rule]:
    norms = [one_norm(config, f"{ours}.{a}", f"{theirs}.{b}") for a, b in _NORMS.items()]
    return [*norms, *attention_and_ffn(config, ours, theirs)]

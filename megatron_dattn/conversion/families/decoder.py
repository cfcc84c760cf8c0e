"""What the decoders of all language families have in common: config fields and weight rules."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron_dattn.conversion.families.rope import read_rope, write_rope
from megatron_dattn.conversion.families.weight_map import (
    GroupedQKV,
    PaddedVocabulary,
    Rule,
    Stacked,
)
from megatron_dattn.conversion.io.hf_folder import ConfigValues
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.config import LanguageConfig

# config.json of a language model always has these; only where it is a section of a larger model's
# (see `llava.py`) may they be left out.
REQUIRED = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "vocab_size",
)
_COPIED = (*REQUIRED, "rms_norm_eps", "tie_word_embeddings")


def unused_prefixes(config: LanguageConfig) -> list[str]:
    """Tensors that a checkpoint may hold and nothing needs: rotary tables, which old releases of
    transformers saved and which follow from `rope_theta`."""
    layers = range(config.num_hidden_layers)
    return [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in layers]


def read_config(
    config: dict[str, Any],
    defaults: dict[str, Any],
    *,
    refused: Sequence[str],
    activations: Sequence[str],
) -> dict[str, Any]:
    """The fields of our `LanguageConfig` but its family, out of a config.json.

    Args:
        defaults: the Hugging Face class's, of every field that the family has.
        refused: switches that must be off.
        activations: those of the FFN that the family may have.

    Raises:
        CheckpointError: a required field is missing, or a feature is not supported.
    """
    given = ConfigValues(config, "the language model's config.json")
    given.check_present(REQUIRED)
    for name in refused:
        if config.get(name):
            raise CheckpointError(f"{name} {config[name]} is not supported")
    full = ConfigValues({**defaults, **config}, given.where)
    act = "hidden_activation" if "hidden_activation" in defaults else "hidden_act"
    if full.values[act] not in activations:
        raise CheckpointError(
            f"{act} '{full.values[act]}' is not supported, only {', '.join(activations)}"
        )
    theta, scaling = read_rope(given, defaults["rope_theta"])
    of_some: dict[str, Callable[[str], float | None]] = {
        "sliding_window": full.whole_or_none,
        "query_pre_attn_scalar": full.number,
        "attn_logit_softcapping": full.number_or_none,
        "final_logit_softcapping": full.number_or_none,
    }
    return {
        **_sizes(full),
        **{name: read(name) for name, read in of_some.items() if name in defaults},
        "rms_norm_eps": full.number("rms_norm_eps"),
        "tie_word_embeddings": full.flag("tie_word_embeddings"),
        "hidden_activation": full.values[act],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": full.whole_or_none("max_position_embeddings"),
    }


def _sizes(config: ConfigValues) -> dict[str, int]:
    sizes = {name: config.whole(name) for name in REQUIRED}
    heads = sizes["num_attention_heads"]
    if heads < 1:
        raise CheckpointError(f"{config.where} has num_attention_heads {heads}")
    return sizes | {
        "num_key_value_heads": config.whole_or_none("num_key_value_heads") or heads,
        "head_dim": config.whole_or_none("head_dim") or sizes["hidden_size"] // heads,
    }


def with_required(section: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A section of a larger model's config.json, completed with what it may leave out."""
    return {**{name: defaults[name] for name in REQUIRED}, **section}


def write_config(language: LanguageConfig, model_type: str) -> dict[str, Any]:
    """The fields of a config.json that all families have; what `read_config` reads."""
    positions = language.max_position_embeddings
    return {
        "model_type": model_type,
        **{name: getattr(language, name) for name in _COPIED},
        **({} if positions is None else {"max_position_embeddings": positions}),
        "num_key_value_heads": language.num_key_value_heads,
        "head_dim": language.head_dim,
        **write_rope(language),
    }


def decoder_rules(
    config: LanguageConfig, layer_rules: Callable[[LanguageConfig, str, str], list[Rule]]
) -> list[Rule]:
    """Rules of the whole decoder.

    Args:
        layer_rules: makes those of one layer from our prefix and theirs, both without the last dot.
    """
    vocabulary = (config.vocab_size, config.hidden_size)
    padded = PaddedVocabulary(config.vocab_size, config.padded_vocab_size)
    embedding = "embedding.word_embeddings.weight"
    rules = [
        Rule(embedding, {"model.embed_tokens.weight": vocabulary}, padded),
        one_norm(config, "decoder.final_layernorm", "model.norm"),
    ]
    if not config.tie_word_embeddings:
        rules.append(Rule("output_layer.weight", {"lm_head.weight": vocabulary}, padded))
    for layer in range(config.num_hidden_layers):
        rules += layer_rules(config, f"decoder.layers.{layer}", f"model.layers.{layer}")
    return rules


def one_norm(config: LanguageConfig, ours: str, theirs: str) -> Rule:
    """A norm's weight."""
    return Rule(f"{ours}.weight", {f"{theirs}.weight": (config.hidden_size,)})


def attention_and_ffn(config: LanguageConfig, ours: str, theirs: str) -> list[Rule]:
    """The linear layers of one layer, and what belongs to its attention."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    return [
        *_qkv(config, f"{ours}.self_attention", f"{theirs}.self_attn"),
        Rule(
            f"{ours}.self_attention.linear_proj.weight",
            {f"{theirs}.self_attn.o_proj.weight": (hidden, queries)},
        ),
        Rule(
            f"{ours}.mlp.linear_fc1.weight",
            {
                f"{theirs}.mlp.gate_proj.weight": (ffn, hidden),
                f"{theirs}.mlp.up_proj.weight": (ffn, hidden),
            },
            Stacked(2),
        ),
        Rule(f"{ours}.mlp.linear_fc2.weight", {f"{theirs}.mlp.down_proj.weight": (hidden, ffn)}),
    ]


def _qkv(config: LanguageConfig, ours: str, theirs: str) -> list[Rule]:
    """Grouped queries, keys and values; with biases and norms in the families that have them."""
    layout = GroupedQKV(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    keys = config.num_key_value_heads * config.head_dim
    rows = {"q": config.num_attention_heads * config.head_dim, "k": keys, "v": keys}

    def joined(kind: str, *columns: int) -> Rule:
        parts = {f"{theirs}.{name}_proj.{kind}": (rows[name], *columns) for name in rows}
        return Rule(f"{ours}.linear_qkv.{kind}", parts, layout)

    rules = [joined("weight", config.hidden_size)]
    if config.has_qkv_bias:
        rules.append(joined("bias"))
    if config.has_qk_norms:
        norm, size = "{}.{}_norm.weight", (config.head_dim,)
        rules += [
            Rule(f"{ours}.{x}_layernorm.weight", {norm.format(theirs, x): size}) for x in "qk"
        ]
    return rules

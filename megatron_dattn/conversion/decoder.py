"""What the decoders of all language families have in common: config fields and weight rules."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron_dattn.conversion.weight_map import GroupedQKV, PaddedRows, Rule, Stacked
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.config import LanguageConfig

# config.json of a language model always has these; only where it is a section of a larger model's
# (see `llava.py`) may they be left out.
REQUIRED = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "vocab_size",
)
_COPIED = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"),
    *("vocab_size", "rms_norm_eps", "tie_word_embeddings"),
)
_COPIED_WHERE_KNOWN = (
    *("sliding_window", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)


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
    missing = [name for name in REQUIRED if not isinstance(config.get(name), int)]
    if missing:
        raise CheckpointError(f"the language model's config.json lacks {', '.join(missing)}")
    for name in refused:
        if config.get(name):
            raise CheckpointError(f"{name} {config[name]} is not supported")
    full = {**defaults, **config}
    act = "hidden_activation" if "hidden_activation" in defaults else "hidden_act"
    if full[act] not in activations:
        raise CheckpointError(
            f"{act} '{full[act]}' is not supported, only {', '.join(activations)}"
        )
    heads = full["num_attention_heads"]
    return {
        **{name: full[name] for name in _COPIED},
        **{name: full[name] for name in _COPIED_WHERE_KNOWN if name in defaults},
        "num_key_value_heads": full["num_key_value_heads"] or heads,
        "head_dim": full.get("head_dim") or full["hidden_size"] // heads,
        "hidden_activation": full[act],
        "rope_theta": _rope_theta(full),
        "max_position_embeddings": config.get("max_position_embeddings"),
    }


def write_config(language: LanguageConfig, model_type: str) -> dict[str, Any]:
    """The fields of a config.json that all families have; what `read_config` reads."""
    positions = language.max_position_embeddings
    return {
        "model_type": model_type,
        **{name: getattr(language, name) for name in _COPIED},
        **({} if positions is None else {"max_position_embeddings": positions}),
        "num_key_value_heads": language.num_key_value_heads,
        "head_dim": language.head_dim,
        # The first is for readers from before transformers 5, which would take a default of theirs.
        "rope_theta": language.rope_theta,
        "rope_parameters": {"rope_theta": language.rope_theta, "rope_type": "default"},
    }


def _rope_theta(config: dict[str, Any]) -> float:
    """Older configs keep rope_theta at the top, newer ones inside rope_parameters."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"rope_type '{kind}' is not supported, only 'default'")
    return float(rope.get("rope_theta", config["rope_theta"]))


def decoder_rules(
    config: LanguageConfig, layer_rules: Callable[[LanguageConfig, str, str], list[Rule]]
) -> list[Rule]:
    """Rules of the whole decoder.

    Args:
        layer_rules: makes those of one layer from our prefix and theirs, both without the last dot.
    """
    vocabulary = (config.vocab_size, config.hidden_size)
    padded = PaddedRows(config.vocab_size, config.padded_vocab_size)
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
    """The linear layers of one layer: grouped attention and a gated FFN, without biases."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return [
        Rule(
            f"{ours}.self_attention.linear_qkv.weight",
            {
                f"{theirs}.self_attn.q_proj.weight": (queries, hidden),
                f"{theirs}.self_attn.k_proj.weight": (keys, hidden),
                f"{theirs}.self_attn.v_proj.weight": (keys, hidden),
            },
            GroupedQKV(config.num_attention_heads, config.num_key_value_heads, config.head_dim),
        ),
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

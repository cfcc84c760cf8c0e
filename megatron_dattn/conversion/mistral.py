"""Mistral: Hugging Face config and weights in our terms."""

from typing import Any

from megatron_dattn.conversion.weight_map import GroupedQKV, Rule, Stacked
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.config import LanguageConfig

# config.json always has these; for the others Hugging Face has defaults.
_REQUIRED = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "vocab_size",
)

UNUSED_PREFIXES: tuple[str, ...] = ()


def language_config(config: dict[str, Any]) -> LanguageConfig:
    """Translate a Mistral config.json.

    Raises:
        CheckpointError: another architecture, or a feature that the training stack lacks.
    """
    if config.get("model_type") != "mistral":
        raise CheckpointError(
            f"the language model is of type '{config.get('model_type')}'; supported: mistral"
        )
    missing = [name for name in _REQUIRED if not isinstance(config.get(name), int)]
    if missing:
        raise CheckpointError(f"the language model's config.json lacks {', '.join(missing)}")
    if config.get("sliding_window") is not None:
        raise CheckpointError(
            f"sliding_window {config['sliding_window']} is not supported; use a model without it "
            "(Mistral v0.2 or later)"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act '{config['hidden_act']}' is not supported, only silu")
    return LanguageConfig(
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        rope_theta=_rope_theta(config),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
    )


def _rope_theta(config: dict[str, Any]) -> float:
    """Older configs keep rope_theta at the top, newer ones inside rope_parameters."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"rope_type '{kind}' is not supported, only 'default'")
    return float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))


def language_rules(config: LanguageConfig) -> list[Rule]:
    """Rules for every parameter of the language model (prefix `language_model.`)."""
    hidden, vocab = config.hidden_size, config.vocab_size
    rules = [
        Rule("embedding.word_embeddings.weight", {"model.embed_tokens.weight": (vocab, hidden)}),
        Rule("decoder.final_layernorm.weight", {"model.norm.weight": (hidden,)}),
    ]
    if not config.tie_word_embeddings:
        rules.append(Rule("output_layer.weight", {"lm_head.weight": (vocab, hidden)}))
    for layer in range(config.num_hidden_layers):
        rules += _layer_rules(config, layer)
    return rules


def _layer_rules(config: LanguageConfig, layer: int) -> list[Rule]:
    ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return [
        Rule(f"{ours}.input_layernorm.weight", {f"{theirs}.input_layernorm.weight": (hidden,)}),
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
            f"{ours}.pre_mlp_layernorm.weight",
            {f"{theirs}.post_attention_layernorm.weight": (hidden,)},
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

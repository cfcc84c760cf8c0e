"""SigLIP: Hugging Face config and weights of the vision encoder in our terms."""

from typing import Any

from megatron_dattn.conversion.weight_map import GroupedQKV, Rule
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.config import VisionConfig

MODEL_TYPES = ("siglip", "siglip_vision_model")


def vision_config(config: dict[str, Any], feature_layer: int = -2) -> VisionConfig:
    """Translate the config.json of a SigLIP vision encoder or of a whole SigLIP model.

    Raises:
        CheckpointError: another architecture or activation.
    """
    if config.get("model_type") not in MODEL_TYPES:
        raise CheckpointError(
            f"the vision encoder is of type '{config.get('model_type')}'; supported: "
            + ", ".join(MODEL_TYPES)
        )
    vision = {**_DEFAULTS, **config.get("vision_config", config)}
    if vision["hidden_act"] != "gelu_pytorch_tanh":
        raise CheckpointError(
            f"hidden_act '{vision['hidden_act']}' is not supported, only gelu_pytorch_tanh"
        )
    return VisionConfig(
        hidden_size=vision["hidden_size"],
        num_hidden_layers=vision["num_hidden_layers"],
        num_attention_heads=vision["num_attention_heads"],
        intermediate_size=vision["intermediate_size"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        layer_norm_eps=vision["layer_norm_eps"],
        feature_layer=feature_layer,
    )


# Hugging Face leaves a field out of config.json where it has the class's default value.
_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}


def unused_prefixes(config: VisionConfig, num_layers: int) -> list[str]:
    """Tensors that features taken at `feature_layer` never touch."""
    above = [f"encoder.layers.{n}." for n in range(config.num_used_layers, num_layers)]
    return ["post_layernorm.", "head.", "embeddings.position_ids", *above]


def vision_rules(config: VisionConfig) -> list[Rule]:
    """Rules for every parameter of the vision encoder (prefix `vision_model.`)."""
    hidden, patch = config.hidden_size, config.patch_size
    rules = [
        Rule(
            "patch_embedding.weight",
            {"embeddings.patch_embedding.weight": (hidden, 3, patch, patch)},
        ),
        Rule("patch_embedding.bias", {"embeddings.patch_embedding.bias": (hidden,)}),
        Rule(
            "position_embedding",
            {"embeddings.position_embedding.weight": (config.num_patches, hidden)},
        ),
    ]
    for layer in range(config.num_used_layers):
        rules += _layer_rules(config, layer)
    return rules


def _layer_rules(config: VisionConfig, layer: int) -> list[Rule]:
    name = f"encoder.layers.{layer}"
    hidden, ffn = config.hidden_size, config.intermediate_size
    qkv = GroupedQKV(
        config.num_attention_heads,
        config.num_attention_heads,
        hidden // config.num_attention_heads,
    )
    rules = []
    for kind, square, up, down in (
        ("weight", (hidden, hidden), (ffn, hidden), (hidden, ffn)),
        ("bias", (hidden,), (ffn,), (hidden,)),
    ):
        attention = f"{name}.self_attn"
        rules += [
            Rule(f"{name}.input_layernorm.{kind}", {f"{name}.layer_norm1.{kind}": (hidden,)}),
            Rule(
                f"{name}.self_attention.linear_qkv.{kind}",
                {f"{attention}.{x}_proj.{kind}": square for x in "qkv"},
                qkv,
            ),
            Rule(
                f"{name}.self_attention.linear_proj.{kind}",
                {f"{attention}.out_proj.{kind}": square},
            ),
            Rule(f"{name}.pre_mlp_layernorm.{kind}", {f"{name}.layer_norm2.{kind}": (hidden,)}),
            Rule(f"{name}.mlp.linear_fc1.{kind}", {f"{name}.mlp.fc1.{kind}": up}),
            Rule(f"{name}.mlp.linear_fc2.{kind}", {f"{name}.mlp.fc2.{kind}": down}),
        ]
    return rules

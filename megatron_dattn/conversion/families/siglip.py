"""SigLIP: Hugging Face config and weights of the vision encoder in our terms.

SigLIP 2's checkpoints of a fixed resolution have the same architecture, and say so in their
config.json. Those of any resolution ("NaFlex", model type siglip2) are another model.
"""

from typing import Any

from megatron_dattn.conversion.families.weight_map import GroupedQKV, Rule
from megatron_dattn.conversion.io.hf_folder import ConfigValues
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.config import VisionConfig

MODEL_TYPES = ("siglip", "siglip_vision_model")
# transformers.SiglipVisionConfig's, for fields that config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}
_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("image_size", "patch_size"),
)
_ACTIVATIONS = ("gelu_pytorch_tanh", "quick_gelu", "gelu")


def vision_config(config: dict[str, Any], feature_layer: int = -2) -> VisionConfig:
    """Translate the config.json of a SigLIP vision encoder or of a whole SigLIP model.

    Raises:
        CheckpointError: a feature that the training stack lacks.
    """
    return VisionConfig(family="siglip", **read_config(config, DEFAULTS, feature_layer))


def read_config(
    config: dict[str, Any], defaults: dict[str, Any], feature_layer: int
) -> dict[str, Any]:
    """The fields of our `VisionConfig` but its family, of an encoder or of a dual encoder.

    Args:
        defaults: the Hugging Face class's.

    Raises:
        CheckpointError: a field of the wrong type, or a feature that is not supported.
    """
    where = "the vision encoder's config.json"
    is_dual_encoder = "vision_config" in config
    section = ConfigValues(config, where).section("vision_config") if is_dual_encoder else config
    vision = {**defaults, **section}
    if vision["hidden_act"] not in _ACTIVATIONS:
        raise CheckpointError(
            f"hidden_act '{vision['hidden_act']}' is not supported, only {', '.join(_ACTIVATIONS)}"
        )
    if vision.get("num_channels", 3) != 3:
        raise CheckpointError(f"num_channels {vision['num_channels']} is not supported, only 3")
    numbers = ConfigValues(vision, where)
    return {
        **{name: numbers.whole(name) for name in _SIZES},
        "layer_norm_eps": numbers.number("layer_norm_eps"),
        "hidden_act": vision["hidden_act"],
        "feature_layer": feature_layer,
    }


def hf_config(vision: VisionConfig, num_layers: int) -> dict[str, Any]:
    """The config.json of an encoder of so many layers."""
    return write_config(vision, "siglip_vision_model", num_layers) | {"vision_use_head": False}


def write_config(vision: VisionConfig, model_type: str, num_layers: int) -> dict[str, Any]:
    """The fields that both families have; what `read_config` reads."""
    fields = {name: getattr(vision, name) for name in DEFAULTS}
    return {"model_type": model_type, **fields, "num_hidden_layers": num_layers}


def unused_prefixes(config: VisionConfig, num_layers: int) -> list[str]:
    """Tensors that features taken at `feature_layer` never touch."""
    above = [f"encoder.layers.{n}." for n in range(config.num_used_layers, num_layers)]
    return ["post_layernorm.", "head.", "embeddings.position_ids", *above]


def vision_rules(config: VisionConfig) -> list[Rule]:
    """Rules for every parameter of the vision encoder (prefix `vision_model.`)."""
    bias = "embeddings.patch_embedding.bias"
    return [
        *embedding_rules(config),
        Rule("patch_embedding.bias", {bias: (config.hidden_size,)}),
        *layer_rules(config),
    ]


def embedding_rules(config: VisionConfig) -> list[Rule]:
    """Patches and their positions."""
    hidden, patch = config.hidden_size, config.patch_size
    return [
        Rule(
            "patch_embedding.weight",
            {"embeddings.patch_embedding.weight": (hidden, 3, patch, patch)},
        ),
        Rule(
            "position_embedding",
            {"embeddings.position_embedding.weight": (config.num_places, hidden)},
        ),
    ]


def layer_rules(config: VisionConfig) -> list[Rule]:
    """All layers that are built."""
    return [rule for layer in range(config.num_used_layers) for rule in _layer(config, layer)]


def _layer(config: VisionConfig, layer: int) -> list[Rule]:
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

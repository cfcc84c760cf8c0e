"""CLIP: Hugging Face config and weights of the vision encoder in our terms.

Its layers are SigLIP's; before them stand a class token and a norm, whose name Hugging Face spells
`pre_layrnorm`.
"""

from typing import Any

from megatron_dattn.conversion.families.siglip import (
    embedding_rules,
    layer_rules,
    read_config,
    unused_prefixes,
    write_config,
)
from megatron_dattn.conversion.families.weight_map import Rule
from megatron_dattn.models.config import VisionConfig

__all__ = [
    "DEFAULTS",
    "MODEL_TYPES",
    "hf_config",
    "unused_prefixes",
    "vision_config",
    "vision_rules",
]

MODEL_TYPES = ("clip", "clip_vision_model")
# transformers.CLIPVisionConfig's, for fields that config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}


def vision_config(config: dict[str, Any], feature_layer: int = -2) -> VisionConfig:
    """Translate the config.json of a CLIP vision encoder or of a whole CLIP model.

    Raises:
        CheckpointError: a feature that the training stack lacks.
    """
    return VisionConfig(family="clip", **read_config(config, DEFAULTS, feature_layer))


def hf_config(vision: VisionConfig, num_layers: int) -> dict[str, Any]:
    """The config.json of an encoder of so many layers."""
    return write_config(vision, "clip_vision_model", num_layers)


def vision_rules(config: VisionConfig) -> list[Rule]:
    """Rules for every parameter of the vision encoder (prefix `vision_model.`)."""
    hidden = (config.hidden_size,)
    return [
        *embedding_rules(config),
        Rule("class_embedding", {"embeddings.class_embedding": hidden}),
        Rule("pre_layernorm.weight", {"pre_layrnorm.weight": hidden}),
        Rule("pre_layernorm.bias", {"pre_layrnorm.bias": hidden}),
        *layer_rules(config),
    ]

"""config.json and generation_config.json of an export, and which models have one at all."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import GenerationConfig, LlavaConfig

from megatron_dattn.attention import AttentionConfig, VisualRows, get_preset
from megatron_dattn.conversion.families import LANGUAGE, VISION
from megatron_dattn.conversion.llava import SELECT_STRATEGIES
from megatron_dattn.errors import ConfigError
from megatron_dattn.hf.configuration_dattn import DAttnConfig
from megatron_dattn.models.config import LanguageConfig, ModelConfig, VisionConfig

AUTO_MAP = {
    "AutoConfig": "configuration_dattn.DAttnConfig",
    "AutoModel": "modeling_dattn.DAttnModel",
    "AutoModelForImageTextToText": "modeling_dattn.DAttnForConditionalGeneration",
    "AutoProcessor": "processing_dattn.DAttnProcessor",
}

# What the exported code can do with visual rows, by the config's `visual_source`: run them through
# all layers, or make them anew in each.
VISUAL_ROWS = {
    "stream": VisualRows(),
    "reproject": VisualRows(source="reproject", ffn=0.0),
}


@dataclass(frozen=True)
class TokenIds:
    """Of the tokens that programs look up in configs."""

    image: int
    bos: int
    eos: int
    pad: int


def is_llava(model: ModelConfig) -> bool:
    """Whether the model's attention is that of Hugging Face's LLaVA, whose code it is given."""
    preset = get_preset(model.attention)
    return preset.attends_in_reading_order and preset.visual == VisualRows()


def check_exportable(model: ModelConfig) -> None:
    """Refuse what neither our exported code nor Hugging Face's LLaVA computes.

    Raises:
        ConfigError: naming the preset, or a setting of the language model, and the reason.
    """
    if is_llava(model):
        reason = _reason_against_llava(model)
    else:
        reason = _reason_against_dattn(get_preset(model.attention))
    if reason:
        raise ConfigError(f"model.attention '{model.attention}' cannot be exported: {reason}")
    _text_config(model.language)


def _reason_against_dattn(preset: AttentionConfig) -> str:
    if preset.scores_visual_rows:
        return (
            f"with v2v='{preset.v2v}' visual rows attend to other rows; the exported code computes "
            "each from its own image alone"
        )
    if preset.t2v.window != "none" or preset.window != "part":
        return (
            f"with t2v.window='{preset.t2v.window}' and window='{preset.window}' images fall out "
            "of a sliding window; the exported code keeps them in sight"
        )
    if preset.visual not in VISUAL_ROWS.values():
        return "the exported code gives visual rows every layer whole, and this preset does not"
    return ""


def _reason_against_llava(model: ModelConfig) -> str:
    """Hugging Face's LLaVA has an adapter of two linear layers, nothing before and after them."""
    needs = "it would become a LlavaForConditionalGeneration, which"
    if model.language.family == "gemma2":
        return (
            f"{needs} scales visual rows as Gemma-2's own embeddings are in transformers 4, and "
            "does not in 5"
        )
    if model.adapter.input_norm:
        return (
            f"{needs} has no norm in front of its adapter; train with model.adapter.input_norm "
            "set to false"
        )
    if model.adapter.hidden_size not in (None, model.language.hidden_size):
        return (
            f"{needs} has an adapter as wide as the language model "
            f"({model.language.hidden_size}), not model.adapter.hidden_size "
            f"{model.adapter.hidden_size}"
        )
    if get_preset(model.attention).positions.embedding != "none":
        return f"{needs} adds no positions to visual rows"
    return ""


def config_from_model(model: ModelConfig, *, tokens: TokenIds, dtype: str) -> dict[str, Any]:
    """The content of config.json: what the model is, and nothing that is a default elsewhere."""
    if is_llava(model):
        content = _llava_config(model, tokens)
        LlavaConfig(**deepcopy(content))  # refuses what it does not know, and edits its arguments
        content |= {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    else:
        content = _dattn_config(model, tokens)
        DAttnConfig(**deepcopy(content))
        content |= {
            "architectures": ["DAttnForConditionalGeneration"],
            "model_type": DAttnConfig.model_type,
            "auto_map": AUTO_MAP,
        }
    return {**content, "dtype": dtype, "transformers_version": transformers.__version__}


def generation_config(stop_ids: list[int], tokens: TokenIds) -> GenerationConfig:
    """Greedy; an answer never holds `<image>`."""
    return GenerationConfig(
        bos_token_id=tokens.bos,
        eos_token_id=stop_ids,
        pad_token_id=tokens.pad,
        suppress_tokens=[tokens.image],
    )


def _dattn_config(model: ModelConfig, tokens: TokenIds) -> dict[str, Any]:
    preset = get_preset(model.attention)
    return {
        "vision_config": _vision_config(model.vision, model.vision.num_hidden_layers),
        "text_config": _text_config(model.language) | _text_tokens(tokens),
        **_special_tokens(tokens),
        "image_token_id": tokens.image,
        "vision_feature_layer": model.vision.feature_layer,
        "adapter_hidden_size": model.adapter.hidden_size or model.language.hidden_size,
        "adapter_input_norm": model.adapter.input_norm,
        "adapter_norm_eps": model.adapter.norm_eps,
        "adapter_max_grid": model.adapter.max_grid,
        "v2v": preset.v2v,
        "t2v_scope": preset.t2v.scope,
        "t2v_rotary": preset.t2v.rotary,
        "text_positions": preset.positions.text,
        "visual_positions": preset.positions.visual,
        "visual_embedding": preset.positions.embedding,
        "visual_source": preset.visual.source,
        "merge": preset.merge,
    }


def _llava_config(model: ModelConfig, tokens: TokenIds) -> dict[str, Any]:
    """The encoder ends at the feature layer: those above it are not in the checkpoint."""
    return {
        "vision_config": _vision_config(model.vision, model.vision.num_used_layers),
        "text_config": _text_config(model.language) | _text_tokens(tokens),
        **_special_tokens(tokens),
        "image_token_index": tokens.image,
        "image_seq_length": model.vision.num_patches,
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": SELECT_STRATEGIES[model.vision.family],
        "vision_feature_layer": -1,
    }


def _vision_config(vision: VisionConfig, num_layers: int) -> dict[str, Any]:
    return VISION[vision.family].hf_config(vision, num_layers)


def _text_config(language: LanguageConfig) -> dict[str, Any]:
    return LANGUAGE[language.family].hf_config(language)


def _special_tokens(tokens: TokenIds) -> dict[str, int]:
    return {
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
    }


def _text_tokens(tokens: TokenIds) -> dict[str, int | None]:
    """Those of the language model, whose embedding in transformers never trains the row of the pad
    token: prompts may be padded with the end token, but its row must learn."""
    pad = None if tokens.pad == tokens.eos else tokens.pad
    return {**_special_tokens(tokens), "pad_token_id": pad}

"""config.json and generation_config.json of an export."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import GenerationConfig, LlavaConfig

from megatron_dattn.conversion.families.exportable import image_rows, is_llava
from megatron_dattn.conversion.families.llava import ADDED_ROWS, SELECT_STRATEGIES
from megatron_dattn.conversion.families.registry import LANGUAGE, VISION
from megatron_dattn.conversion.io.hf_folder import AUTO_MAP
from megatron_dattn.hf.configuration_dattn import DAttnConfig
from megatron_dattn.hf.versions_dattn import NEWEST_TESTED, TESTED_RANGE
from megatron_dattn.models.config import LanguageConfig, ModelConfig, VisionConfig

# The oldest transformers that a LlavaForConditionalGeneration of ours was read with. The newest is
# that of our own code.
OLDEST_STOCK = "4.57.6"


@dataclass(frozen=True)
class TokenIds:
    """Of the tokens that programs look up in configs."""

    image: int
    bos: int | None
    """Some models, Qwen's, begin a text with none."""
    eos: int
    pad: int


def config_from_model(model: ModelConfig, *, tokens: TokenIds, dtype: str) -> dict[str, Any]:
    """The content of config.json: what the model is, and nothing that is a default elsewhere."""
    if is_llava(model):
        content = _llava_config(model, tokens)
        LlavaConfig(**deepcopy(content))  # refuses what it does not know, and edits its arguments
        content |= {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "transformers_tested": f">={OLDEST_STOCK},<={NEWEST_TESTED}",
        }
    else:
        content = _dattn_config(model, tokens)
        DAttnConfig(**deepcopy(content))
        content |= {
            "architectures": ["DAttnForConditionalGeneration"],
            "model_type": DAttnConfig.model_type,
            "auto_map": AUTO_MAP,
            "transformers_tested": TESTED_RANGE,
        }
    return {**content, "dtype": dtype, "transformers_version": transformers.__version__}


def generation_config(
    stop_ids: list[int], tokens: TokenIds, model: ModelConfig
) -> GenerationConfig:
    """Greedy; an answer never holds `<image>`."""
    rows = model.language.vocab_size + image_rows(model, tokens.image)
    return GenerationConfig(
        bos_token_id=tokens.bos,
        eos_token_id=stop_ids,
        pad_token_id=tokens.pad,
        suppress_tokens=[tokens.image] if tokens.image < rows else None,
    )


def _dattn_config(model: ModelConfig, tokens: TokenIds) -> dict[str, Any]:
    preset = model.preset
    return {
        "vision_config": _vision_config(model.vision, model.vision.num_hidden_layers),
        "text_config": _text_config(model.language) | _text_tokens(tokens),
        **_special_tokens(tokens),
        "image_token_id": tokens.image,
        "vision_feature_layer": model.vision.feature_layer,
        "adapter_hidden_size": model.adapter.hidden_size or model.language.hidden_size,
        "adapter_norm": model.adapter_norm,
        "adapter_norm_eps": model.adapter.norm_eps,
        "adapter_max_grid": model.adapter.max_grid,
        "adapter_num_places": model.num_places,
        "v2v": preset.v2v,
        "t2v_scope": preset.t2v.scope,
        "t2v_rotary": preset.t2v.rotary,
        "text_positions": preset.positions.text,
        "visual_positions": preset.positions.visual,
        "visual_embedding": model.visual_embedding,
        "visual_source": preset.visual.source,
        "merge": preset.merge,
    }


def _llava_config(model: ModelConfig, tokens: TokenIds) -> dict[str, Any]:
    """The encoder ends at the feature layer: those above it are not in the checkpoint."""
    rows = image_rows(model, tokens.image)
    text = _text_config(model.language) | _text_tokens(tokens)
    text["vocab_size"] += rows
    return {
        **({ADDED_ROWS: rows} if rows else {}),
        "vision_config": _vision_config(model.vision, model.vision.num_used_layers),
        "text_config": text,
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


def _special_tokens(tokens: TokenIds) -> dict[str, int | None]:
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

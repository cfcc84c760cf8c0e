"""Which models have a form in Hugging Face's world, and which of the two they get.

Decomposed models are given code of ours, plain self-attention is Hugging Face's own LLaVA. Neither
computes everything that can be trained; what it does not is refused with the reason.
"""

from megatron_dattn.attention import AttentionConfig
from megatron_dattn.attention.visual_config import VisualTokensConfig
from megatron_dattn.conversion.families.registry import LANGUAGE
from megatron_dattn.errors import ConfigError
from megatron_dattn.models.config import LanguageConfig, ModelConfig

# What the exported code can do with visual tokens, by the config's `visual_source`: run them
# through all layers, or make them anew in each.
VISUAL_TOKENS = {
    "stream": VisualTokensConfig(),
    "reproject": VisualTokensConfig(source="reproject", ffn=0.0),
}


def is_llava(model: ModelConfig) -> bool:
    """True if the model's attention is that of Hugging Face's LLaVA, whose code it is given."""
    preset = model.preset
    return preset.attends_in_reading_order and preset.visual == VisualTokensConfig()


def image_rows(model: ModelConfig, image_token_id: int) -> int:
    """Rows that Hugging Face's embedding needs behind the vocabulary's: LLaVA looks `<image>` up
    before it puts the image in its place, our exported code does not."""
    return max(0, image_token_id + 1 - model.language.vocab_size) if is_llava(model) else 0


def check_exportable(model: ModelConfig) -> None:
    """Refuse what neither our exported code nor Hugging Face's LLaVA computes.

    Raises:
        ConfigError: naming the preset, or a setting of the language model, and the reason.
    """
    if is_llava(model):
        reason = _reason_against_llava(model)
    else:
        reason = _reason_against_dattn(model.preset)
    reason = reason or _reason_against_language(model.language)
    if reason:
        raise ConfigError(f"model.attention '{model.attention}' cannot be exported: {reason}")


def _reason_against_dattn(preset: AttentionConfig) -> str:
    if preset.scores_visual_tokens:
        return (
            f"with v2v='{preset.v2v}' visual tokens attend to other tokens; the exported code "
            "computes each from its own image alone"
        )
    if preset.t2v.window != "none" or preset.window != "part":
        return (
            f"with t2v.window='{preset.t2v.window}' and window='{preset.window}' images fall out "
            "of a sliding window; the exported code keeps them in sight"
        )
    if preset.visual not in VISUAL_TOKENS.values():
        return "the exported code gives visual tokens every layer whole, and this preset does not"
    return ""


def _reason_against_llava(model: ModelConfig) -> str:
    """Hugging Face's LLaVA has an adapter of two linear layers, nothing before and after them."""
    needs = "it would become a LlavaForConditionalGeneration, which"
    if model.language.family == "gemma2":
        return (
            f"{needs} scales visual tokens as Gemma-2's own embeddings are in transformers 4, and "
            "does not in 5"
        )
    if model.adapter_norm != "none":
        return (
            f"{needs} has no norm in its adapter, and model.adapter.norm is "
            f"'{model.adapter_norm}'; train with model.adapter.norm set to none"
        )
    if model.adapter.hidden_size not in (None, model.language.hidden_size):
        return (
            f"{needs} has an adapter as wide as the language model "
            f"({model.language.hidden_size}), not model.adapter.hidden_size "
            f"{model.adapter.hidden_size}"
        )
    if model.visual_embedding != "none":
        return f"{needs} adds no positions to visual tokens"
    return ""


def _reason_against_language(language: LanguageConfig) -> str:
    """A setting that the family's Hugging Face class cannot have; its config says so itself."""
    try:
        LANGUAGE[language.family].hf_config(language)
    except ConfigError as error:
        return str(error)
    return ""

"""Which of our conversation templates an imported model is asked in.

A default only: `data.template` of a run, and `--template` of the tools, say otherwise.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_dattn.conversion.hf_processor import chat_template
from megatron_dattn.data.templates import TEMPLATES, TemplateName
from megatron_dattn.data.tokenizer import special_token_ids

# By family of the language model; the first whose control tokens the tokenizer has.
_BY_FAMILY: dict[str, tuple[TemplateName, ...]] = {
    "mistral": ("mistral_v3",),
    "llama": ("llama3", "vicuna_v1"),
    "gemma2": ("gemma",),
}


def spoken_template(folder: Path, tokenizer: PreTrainedTokenizerBase, family: str) -> TemplateName:
    """The template that an export of ours was made with, else the language family's.

    Args:
        folder: the tokenizer's; its chat_template.jinja is compared with ours.
        family: of the language model (`LanguageConfig.family`).

    Returns:
        `plain`, which every tokenizer can write, where nothing else fits.
    """
    path = folder / "chat_template.jinja"
    stored = path.read_text(encoding="utf-8") if path.is_file() else None
    for name in TEMPLATES:
        if chat_template(name) == stored:
            return name
    special = special_token_ids(tokenizer)
    for name in _BY_FAMILY[family]:
        control = TEMPLATES[name].control
        if all(tokenizer.convert_tokens_to_ids(token) in special for token in control):
            return name
    return "plain"

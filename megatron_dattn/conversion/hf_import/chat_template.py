"""Which conversation template an imported model is asked in: its own, or one of ours.

A default only: `data.template` of a run, and `--template` of the tools, say otherwise.
"""

import logging
import re
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from megatron_dattn.conversion.hf_import.tokenizer import TEKKEN_RESERVED
from megatron_dattn.conversion.io.tokenizer_files import CHAT_TEMPLATE_FILE, chat_template
from megatron_dattn.data.model_template import ModelTemplate
from megatron_dattn.data.templates import TEMPLATES, TemplateName
from megatron_dattn.data.tokenizer import own_chat_template, special_token_ids
from megatron_dattn.errors import ConfigError

logger = logging.getLogger(__name__)


# With the space around it, which ours all strip ({#- -#}).
_COMMENT = re.compile(r"\s*\{#-.*?-#\}\s*", re.DOTALL)


class TemplateChoice(NamedTuple):
    """A template and, for people, why it was chosen."""

    name: TemplateName
    reason: str


# By family of the language model; the first whose control tokens the tokenizer has.
_BY_FAMILY: dict[str, tuple[TemplateName, ...]] = {
    "mistral": ("mistral_v3", "mistral_v1"),
    "llama": ("llama3", "vicuna_v1"),
    "gemma2": ("gemma",),
    # ChatML, which their tokenizers bring.
    "qwen2": (),
    "qwen3": (),
}

_TEKKEN = TemplateChoice(
    "mistral_v3",
    "a guess for a model with a Tekken tokenizer (Nemo, Small 3): those were trained without the "
    "spaces that it writes behind [INST] and [/INST]",
)


def choose_template(
    folder: Path, tokenizer: PreTrainedTokenizerBase, family: str
) -> TemplateChoice:
    """The template that an export of ours was made with; the model's own; the language family's.

    Warns if that is a guess: templates without control tokens fit every tokenizer of the family,
    base models' and those of chat models that were trained with another.

    Args:
        folder: the tokenizer's; its chat_template.jinja is compared with ours.
        family: of the language model (`LanguageConfig.family`).

    Returns:
        `plain`, which every tokenizer can write, where nothing else fits.
    """
    path = folder / CHAT_TEMPLATE_FILE
    stored = path.read_text(encoding="utf-8") if path.is_file() else ""
    for name in TEMPLATES:
        if _without_comments(chat_template(name)) == _without_comments(stored):
            return TemplateChoice(name, "the export's own")
    if _own_can_be_used(folder, tokenizer):
        return TemplateChoice("model", "the chat template that came with its tokenizer")
    special = special_token_ids(tokenizer)
    for name in _BY_FAMILY[family]:
        control = TEMPLATES[name].control
        if control and all(tokenizer.convert_tokens_to_ids(t) in special for t in control):
            choice = TemplateChoice(name, f"the tokenizer has its {', '.join(control)}")
            return _as_guess(folder, _TEKKEN) if _is_tekken(tokenizer) else choice
    return _as_guess(folder, _guess(family))


def _without_comments(template: str) -> str:
    """The Jinja source that renders, of which older exports have the same."""
    return _COMMENT.sub("", template)


def _own_can_be_used(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has a chat template; warns of one that training cannot use."""
    if own_chat_template(tokenizer) is None:
        return False
    try:
        ModelTemplate(tokenizer)
    except ConfigError as error:
        logger.warning("the chat template in %s is not used: %s", folder, error)
        return False
    return True


def _is_tekken(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is one of Mistral's newer tokenizers; their control tokens are the older ones'."""
    return any(TEKKEN_RESERVED.fullmatch(token) for token in tokenizer.get_added_vocab())


def _guess(family: str) -> TemplateChoice:
    name: TemplateName = next(
        (name for name in _BY_FAMILY[family] if not TEMPLATES[name].control), "plain"
    )
    controls = [", ".join(TEMPLATES[n].control) for n in _BY_FAMILY[family] if TEMPLATES[n].control]
    lacks = f"its tokenizer lacks {' and '.join(controls) or 'a chat template'}"
    loss = "; the questions themselves are not shown to the model then" if name == "plain" else ""
    return TemplateChoice(name, f"a guess for a model of family {family}: {lacks}{loss}")


def _as_guess(folder: Path, guess: TemplateChoice) -> TemplateChoice:
    logger.warning(
        "%s will be asked in the template %s, %s; if it was trained with another, set "
        "data.template in the new config.yaml",
        folder,
        *guess,
    )
    return guess

"""Our chat templates in Jinja, with `{% generation %}` around what is supervised.

All but `plain` are complete chat templates and are exported with the model; `plain` is LLaVA's
format for captions, where the question is dropped. A new one is a file, an entry in `TEMPLATES` and
its name in `TemplateName`. `model` is none of them: it stands for the one that came with a
tokenizer (model_template.py).
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from megatron_dattn.errors import ConfigError

TemplateName = Literal[
    "model", "plain", "mistral_v1", "mistral_v3", "llama2", "llama3", "gemma", "vicuna_v1"
]
TEMPLATE_NAMES: tuple[TemplateName, ...] = get_args(TemplateName)


@dataclass(frozen=True)
class TemplateTokens:
    """Which of the tokenizer's entries a template relies on."""

    control: tuple[str, ...] = ()
    """Special tokens that it writes, apart from the tokenizer's own first and last."""
    end: str | None = None
    """The one of them that ends an answer; None if the tokenizer's last token does."""


TEMPLATES: dict[TemplateName, TemplateTokens] = {
    "plain": TemplateTokens(),
    "mistral_v1": TemplateTokens(),
    "mistral_v3": TemplateTokens(("[INST]", "[/INST]")),
    "llama2": TemplateTokens(),
    "llama3": TemplateTokens(
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), end="<|eot_id|>"
    ),
    "gemma": TemplateTokens(("<start_of_turn>", "<end_of_turn>"), end="<end_of_turn>"),
    "vicuna_v1": TemplateTokens(),
}


def template_tokens(name: str) -> TemplateTokens:
    """Tokens that a template needs of the tokenizer; one that came with it has what it needs.

    Raises:
        ConfigError: there is no template of that name.
    """
    if name == "model":
        return TemplateTokens()
    for known, tokens in TEMPLATES.items():
        if known == name:
            return tokens
    raise ConfigError(
        f"data.template '{name}' is unknown; choose one of {', '.join(sorted(TEMPLATE_NAMES))}"
    )


@cache
def read_template(name: str) -> str:
    """The Jinja source of a template of ours.

    Raises:
        ConfigError: there is no template of that name.
    """
    template_tokens(name)
    assert name != "model", "that one is the tokenizer's"
    return (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8")

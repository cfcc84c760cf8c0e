"""The chat template of a Hugging Face folder: chat messages to a prompt, in Jinja.

An export writes it; an import recognises its own and knows what it was trained in.
"""

from pathlib import Path

from megatron_dattn.data.templates import read_template

CHAT_TEMPLATE_FILE = "chat_template.jinja"


def chat_template(template: str) -> str:
    """The Jinja source that makes prompts of chat messages.

    Training's template for captions takes an image and its caption; the exported one also makes a
    prompt of an image alone.
    """
    if template == "plain":
        return Path(__file__).with_name("plain.jinja").read_text(encoding="utf-8")
    return read_template(template)


def write_chat_template(target: Path, template: str) -> None:
    """Write the one file of it: a second copy, in tokenizer_config.json, would only grow stale."""
    (target / CHAT_TEMPLATE_FILE).write_text(chat_template(template), encoding="utf-8")

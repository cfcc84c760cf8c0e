"""Rendering a chat template: messages to text, in Hugging Face's dialect of Jinja."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

Span = tuple[int, int]  # characters start .. end-1

# A compiled template keeps its spans in itself while it renders, and is shared by all users.
_render_lock = threading.Lock()


def render_messages(
    source: str,
    messages: Sequence[Mapping[str, str]],
    special_text: Mapping[str, Any],
    *,
    prompt: bool = False,
    marked: bool = False,
) -> tuple[str, list[Span]]:
    """The text of a conversation, and what stands inside the template's `{% generation %}` blocks.

    Args:
        source: the template, in Jinja.
        special_text: `bos_token`, `eos_token` and so on, as the template calls them.
        prompt: go on to where the next answer begins.
        marked: the template has such blocks; there are no spans otherwise.

    Raises:
        Exception: whatever the template raises; Jinja's TemplateError where it refuses messages.
    """
    with _render_lock:
        # The declared return type of this function is that of its older form.
        rendered: Any = render_jinja_template(
            [[dict(message) for message in messages]],
            chat_template=source,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=prompt,
            **special_text,
        )
    texts, spans = rendered
    return texts[0], spans[0] if marked else []

"""The chat template that came with a language model: its text, and what of it is supervised.

Published templates seldom mark the answers. So the template writes, once for each shape of
conversation, placeholders in place of the texts: what stands between them is its own. With that the
answers are found in the text of a real conversation, which is rendered as it is and has to agree.

Supervised is what the model writes itself: everything between the prompt for an answer and the
token that ends it. Where a template has `{% generation %}` blocks, they say it.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from transformers import PreTrainedTokenizerBase

from megatron_dattn.data.conversation import Conversation, Turn
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.rendering import Span, render_messages
from megatron_dattn.data.tokenizer import own_chat_template, special_token_ids
from megatron_dattn.errors import ConfigError

Messages = Sequence[Mapping[str, str]]

MAX_KNOWN_SHAPES = 1024
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Private characters, which no template writes and none strips.
_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
# Templates may write today's date. A text of training must be the same tomorrow.
_TODAY = datetime(2024, 7, 26)
_EXCHANGE = Conversation((Turn("user", "x"), Turn("assistant", "x")))


@dataclass(frozen=True)
class _FixedText:
    """What a template writes around the texts of conversations of one shape."""

    order: tuple[int, ...]
    """The messages in the order in which they are written."""
    pieces: tuple[str, ...]
    """The template's own text: before, between and behind them."""
    leads: tuple[int, ...]
    """For each place in `order`: characters before the message that the model writes, too."""
    ends: tuple[int, ...]
    """The same for what is behind it: up to the end of the token that ends an answer."""


class ModelTemplate:
    """Renders conversations with a tokenizer's own chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Try the template.

        Raises:
            ConfigError: there is none, or it cannot write a question and its answer, or nothing in
                it ends an answer.
        """
        source = own_chat_template(tokenizer)
        if source is None:
            raise ConfigError(
                "data.template is 'model', but no chat template came with the tokenizer; name one "
                "of ours"
            )
        self.source = _with_fixed_date(source)
        self.identity = f"model ({hashlib.sha256(source.encode()).hexdigest()[:12]})"
        self._marked = _GENERATION.search(source) is not None
        self._special_text = dict(tokenizer.special_tokens_map)
        tokens = tokenizer.convert_ids_to_tokens(sorted(special_token_ids(tokenizer)))
        longest_first = sorted(map(re.escape, tokens), key=len, reverse=True)
        self._control = re.compile(rf"\s*({'|'.join(longest_first)})")
        self._fixed_texts: dict[tuple[str, ...], _FixedText] = {}
        try:
            self.end_token = self._find_end_token()
        except SampleError as error:
            raise ConfigError(f"data.template is 'model', but {error}") from error

    def _find_end_token(self) -> str:
        """The special token that stands behind the last answer, and is supervised.

        Raises:
            ConfigError: there is none.
        """
        text, spans = self.render(_EXCHANGE)
        behind = self._fixed_text(_EXCHANGE.messages).pieces[-1]
        match = self._control.match(behind)
        # Blocks may leave it out, though the model has to write it.
        if match is None or not spans or spans[-1][1] < len(text) - len(behind) + match.end():
            raise ConfigError(
                "data.template is 'model', but its tokenizer's chat template ends answers with no "
                "token that the model would learn: it would never stop; name one of ours"
            )
        return match[1]

    def render(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The full text and the spans of it that are supervised.

        After a last question the text goes on to where its answer begins.

        Raises:
            SampleError: the template refuses the conversation, or changes its texts.
        """
        messages = conversation.messages
        asks = conversation.turns[-1].role == "user"
        text, spans = self._text(messages, prompt=asks)
        if self._marked or asks:
            return text, spans
        return text, _find(text, messages, self._fixed_text(messages))

    def _text(self, messages: Messages, *, prompt: bool = False) -> tuple[str, list[Span]]:
        try:
            return render_messages(
                self.source, messages, self._special_text, prompt=prompt, marked=self._marked
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise SampleError(
                Reason.TEMPLATE,
                f"the tokenizer's chat template cannot write this conversation: {error}",
            ) from error

    def _fixed_text(self, messages: Messages) -> _FixedText:
        shape = tuple(message["role"] for message in messages)
        known = self._fixed_texts.get(shape)
        if known is None:
            known = self._find_fixed_text(shape)
            if len(self._fixed_texts) >= MAX_KNOWN_SHAPES:
                self._fixed_texts.clear()  # by this thread or another: what is known is returned
            self._fixed_texts[shape] = known
        return known

    def _find_fixed_text(self, shape: tuple[str, ...]) -> _FixedText:
        placeholders = [
            {"role": role, "content": f"\ue000{index}\ue001"} for index, role in enumerate(shape)
        ]
        split = _PLACEHOLDER.split(self._text(placeholders)[0])
        pieces, order = tuple(split[::2]), tuple(map(int, split[1::2]))
        if sorted(order) != list(range(len(shape))):
            raise SampleError(
                Reason.TEMPLATE,
                "the tokenizer's chat template does not write each message once (roles: "
                f"{', '.join(shape)})",
            )
        last = self._control.match(pieces[-1])
        leads, ends = [], []
        known: dict[str, int] = {}  # few texts stand before answers, however many answers there are
        for index, before, behind in zip(order, pieces[:-1], pieces[1:], strict=True):
            answers = shape[index] == "assistant"
            if answers and before not in known:
                known[before] = self._lead(placeholders[:index], before)
            leads.append(known[before] if answers else 0)
            end = self._control.match(behind) if answers else None
            ends.append(end.end() if end and last and end[1] == last[1] else 0)
        return _FixedText(order, pieces, tuple(leads), tuple(ends))

    def _lead(self, asked: Messages, before: str) -> int:
        """Characters that stand between the prompt for an answer and the answer.

        Args:
            asked: the messages up to the question, with placeholders for texts.
            before: the template's text between the last placeholder and the answer.
        """
        prompt, question = (
            _PLACEHOLDER.split(self._text(asked, prompt=goes_on)[0])[-1]
            for goes_on in (True, False)
        )
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        # A template without a prompt for answers leaves the turn's own header to nobody.
        if lead and (prompt != question or lead.isspace()):
            return len(lead)
        # A space in front of a word is the beginning of the word's token.
        return int(before.endswith(" "))


def _find(text: str, messages: Messages, around: _FixedText) -> list[Span]:
    """The supervised spans of a text that a template wrote.

    Raises:
        SampleError: it is not what the template writes around these messages.
    """
    spans, position = [], len(around.pieces[0])
    places = zip(around.order, around.pieces[1:], around.leads, around.ends, strict=True)
    sound = text.startswith(around.pieces[0])
    for index, behind, lead, end in places:
        content = messages[index]["content"]
        written = (content, content.strip(), content.rstrip(), content.lstrip())
        length = next((len(w) for w in written if text.startswith(w + behind, position)), None)
        if length is None:
            sound = False
            break
        if messages[index]["role"] == "assistant":
            spans.append((position - lead, position + length + end))
        position += length + len(behind)
    if not sound or position != len(text):
        raise SampleError(
            Reason.TEMPLATE, "the tokenizer's chat template changes the texts of this conversation"
        )
    return spans


def _with_fixed_date(source: str) -> str:
    """A template whose today is always the same day."""
    if "strftime_now" not in source:
        return source
    # A macro hides the function of this name. Nothing but plain values can be handed to a template.
    replaced = "".join(
        f" | replace('%{letter}', '{_TODAY.strftime('%' + letter)}')" for letter in "aAbBdHIjmMpSyY"
    )
    return (
        "{%- macro strftime_now(format) -%}{%- set text = format" + replaced + " -%}"
        "{%- if '%' in text -%}{{- raise_exception('unknown format of a date: ' + format) -}}"
        "{%- endif -%}{{- text -}}{%- endmacro +%}" + source
    )

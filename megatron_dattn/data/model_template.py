"""The chat template that came with a language model: its text, and what of it is supervised.

Published templates seldom mark the answers. So the template writes, once for each shape of
conversation, marks in place of the texts: what stands between the marks is its own. With that the
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
from megatron_dattn.data.tokenizer import special_token_ids
from megatron_dattn.errors import ConfigError

Messages = Sequence[Mapping[str, str]]

MAX_KNOWN_SHAPES = 1024
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Private characters, which no template writes and none strips.
_MARK = re.compile("\ue000(\\d+)\ue001")
# Templates may write today's date. A text of training must be the same tomorrow.
_TODAY = datetime(2024, 7, 26)
_EXCHANGE = Conversation((Turn("user", "x"), Turn("assistant", "x")))


def own_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The Jinja source that came with a tokenizer: of several that for chats; None if none did."""
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    return source or None


@dataclass(frozen=True)
class _Skeleton:
    """What a template writes around the texts of conversations of one shape."""

    order: tuple[int, ...]
    """The messages in the order in which they are written."""
    fixed: tuple[str, ...]
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
        self._skeletons: dict[tuple[str, ...], _Skeleton] = {}
        try:
            self.render(_EXCHANGE)
        except SampleError as error:
            raise ConfigError(f"data.template is 'model', but {error}") from error
        self.end_token = self._find_end_token()

    def _find_end_token(self) -> str:
        """The special token that stands behind the last answer, and is supervised.

        Raises:
            ConfigError: there is none.
        """
        text, spans = self.render(_EXCHANGE)
        behind = self._skeleton(_EXCHANGE.messages).fixed[-1]
        match = self._control.match(behind)
        # Blocks may leave it out, though the model has to write it.
        if match is None or spans[-1][1] < len(text) - len(behind) + match.end():
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
        return text, _find(text, messages, self._skeleton(messages))

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

    def _skeleton(self, messages: Messages) -> _Skeleton:
        shape = tuple(message["role"] for message in messages)
        if shape not in self._skeletons:
            if len(self._skeletons) >= MAX_KNOWN_SHAPES:
                self._skeletons.clear()
            self._skeletons[shape] = self._make_skeleton(shape)
        return self._skeletons[shape]

    def _make_skeleton(self, shape: tuple[str, ...]) -> _Skeleton:
        marks = [
            {"role": role, "content": f"\ue000{index}\ue001"} for index, role in enumerate(shape)
        ]
        pieces = _MARK.split(self._text(marks)[0])
        fixed, order = tuple(pieces[::2]), tuple(map(int, pieces[1::2]))
        if sorted(order) != list(range(len(shape))):
            raise SampleError(
                Reason.TEMPLATE,
                "the tokenizer's chat template does not write each message once (roles: "
                f"{', '.join(shape)})",
            )
        last = self._control.match(fixed[-1])
        leads, ends = [], []
        known: dict[str, int] = {}  # few texts stand before answers, however many answers there are
        for index, before, behind in zip(order, fixed[:-1], fixed[1:], strict=True):
            answers = shape[index] == "assistant"
            if answers and before not in known:
                known[before] = self._lead(marks[:index], before)
            leads.append(known[before] if answers else 0)
            end = self._control.match(behind) if answers else None
            ends.append(end.end() if end and last and end[1] == last[1] else 0)
        return _Skeleton(order, fixed, tuple(leads), tuple(ends))

    def _lead(self, asked: Messages, before: str) -> int:
        """Characters that stand between the prompt for an answer and the answer.

        Args:
            asked: the messages up to the question, with marks for texts.
            before: the template's text between the last mark and the answer.
        """
        prompt, question = (
            _MARK.split(self._text(asked, prompt=goes_on)[0])[-1] for goes_on in (True, False)
        )
        if not before.startswith(prompt):
            return 0
        lead = before[len(prompt) :]
        # A template without a prompt for answers leaves the turn's own header to nobody.
        return len(lead) if prompt != question or lead.isspace() else 0


def _find(text: str, messages: Messages, skeleton: _Skeleton) -> list[Span]:
    """The supervised spans of a text that a template wrote.

    Raises:
        SampleError: it is not what the template writes around these messages.
    """
    spans, position = [], len(skeleton.fixed[0])
    places = zip(skeleton.order, skeleton.fixed[1:], skeleton.leads, skeleton.ends, strict=True)
    sound = text.startswith(skeleton.fixed[0])
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
    macro = "{%- macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro -%}"
    return macro + source

"""From a conversation to text tokens and labels: render once, tokenise once.

The template marks what is supervised, the tokenizer says which characters each token came from, and
the label mask is the overlap of the two. No part is ever tokenised on its own, so mask and tokens
cannot disagree, whatever the tokenizer does with white space.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from megatron_dattn.batch import IGNORED_LABEL
from megatron_dattn.data.conversation import IMAGE_TOKEN, Conversation, Turn
from megatron_dattn.data.model_template import ModelTemplate
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.rendering import Span, render_messages
from megatron_dattn.data.templates import read_template, template_tokens
from megatron_dattn.data.tokenizer import longest_token, special_token_ids, token_id

MAX_KNOWN_SHAPES = 1024
MAX_KNOWN_TURNS = 64

Shape = tuple[bool, tuple[tuple[str, int], ...]]  # system message? role and images of each turn


@dataclass(frozen=True)
class TextTokens:
    """A conversation as the language model gets it; the `<image>` tokens are taken out."""

    input_ids: list[int]
    labels: list[int]  # the next token if it is supervised, else IGNORED_LABEL
    image_offsets: tuple[int, ...]  # per image: text tokens before it

    def repeated(self, numbers: Iterable[int]) -> "TextTokens":
        """The same with each image's place as often as its number says; an image may be several
        for the model. Numbers without an image do nothing."""
        places = zip(self.image_offsets, numbers, strict=False)
        offsets = tuple(offset for offset, number in places for _ in range(number))
        return replace(self, image_offsets=offsets)


class _NamedTemplate:
    """One of our templates, which mark what is supervised."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._source = read_template(name)
        self._special_text = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        self.identity = name
        self.end_token = template_tokens(name).end

    def render(self, conversation: Conversation) -> tuple[str, list[Span]]:
        return render_messages(
            self._source,
            conversation.messages,
            self._special_text,
            prompt=conversation.turns[-1].role == "user",
            marked=True,
        )


class ConversationTokenizer:
    """Turns conversations into text tokens under one template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        """Prepare one.

        Args:
            template: a name of ours, or `model` for the tokenizer's own.

        Raises:
            ConfigError: there is no such template, or the tokenizer's own cannot be used.
        """
        self.template = template
        self._template = (
            ModelTemplate(tokenizer) if template == "model" else _NamedTemplate(template, tokenizer)
        )
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._image_id = token_id(tokenizer, IMAGE_TOKEN)
        self._special_ids = special_token_ids(tokenizer)
        self.longest_token = longest_token(tokenizer)
        self._expected: dict[Shape, list[int]] = {}

    def __call__(self, conversation: Conversation) -> TextTokens:
        """Render and tokenise.

        Raises:
            SampleError: the template cannot express the conversation, or its text contains control
                tokens, which only the template may write.
        """
        self.require_turns(conversation)
        ids, offsets, spans = self._checked(conversation)
        return _text_tokens(ids, _supervised(offsets, spans), self._image_id)

    @property
    def identity(self) -> str:
        """The name of our template, or a hash of the text of another one."""
        return self._template.identity

    @property
    def end_token(self) -> str | None:
        """The special token that ends an answer; None if the tokenizer's last token does."""
        return self._template.end_token

    def require_turns(self, conversation: Conversation) -> None:
        """Raise SampleError if the template cannot express so many turns."""
        if self.template == "plain" and len(conversation.turns) != 2:
            raise SampleError(
                Reason.NOT_A_CAPTION,
                f"template 'plain' takes one question and one answer, not "
                f"{len(conversation.turns)} turns",
            )

    def prompt(self, conversation: Conversation) -> TextTokens:
        """The tokens that an answer continues, from a conversation whose last turn is a question.

        Raises:
            SampleError: as for a whole conversation.
        """
        # Captions have no question to end with, and a template that came with a model need not
        # write its prompt as it writes what stands before an answer: stop where an answer begins.
        answer = {"plain": "", "model": "x"}.get(self.template)
        if answer is not None:
            turns = (*conversation.turns, Turn("assistant", answer))
            conversation = replace(conversation, turns=turns)
        ids, offsets, spans = self._checked(conversation)
        if answer is not None:
            ids = ids[: _supervised(offsets, spans[-1:]).index(True)]
        return _text_tokens(ids, [False] * len(ids), self._image_id)

    def render(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The conversation's full text and the spans of it that are supervised.

        After a last question the text goes on to where its answer begins.
        """
        return self._template.render(conversation)

    def _checked(self, conversation: Conversation) -> tuple[list[int], list[Span], list[Span]]:
        """Token ids, their characters and the supervised spans.

        Raises:
            SampleError: there are control tokens that are not the template's.
        """
        ids, offsets, spans = self._tokenise(conversation)
        if self._controls(ids) != self._expected_controls(conversation):
            raise SampleError(
                Reason.CONTROL_TOKEN, "the text contains a control token of the tokenizer"
            )
        return ids, offsets, spans

    def _tokenise(self, conversation: Conversation) -> tuple[list[int], list[Span], list[Span]]:
        text, spans = self.render(conversation)
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets, spans

    def _controls(self, ids: list[int]) -> list[int]:
        special = self._special_ids
        return [index for index in ids if index in special]

    def _expected_controls(self, conversation: Conversation) -> list[int]:
        """The control tokens of a harmless conversation with the same turns and images."""
        roles = tuple((turn.role, turn.num_images) for turn in conversation.turns)
        shape = (conversation.system is not None, roles)
        expected = self._expected.get(shape)
        if expected is None:
            turns = tuple(
                Turn(turn.role, f"{IMAGE_TOKEN * turn.num_images}x", turn.num_images)
                for turn in conversation.turns
            )
            system = None if conversation.system is None else "x"
            ids, _, _ = self._tokenise(Conversation(turns, conversation.images, system))
            expected = self._controls(ids)
            self._remember(shape, expected)
        return expected

    def _remember(self, shape: Shape, expected: list[int]) -> None:
        """Most conversations have few turns and one of few shapes; the others are not kept."""
        if len(shape[1]) <= MAX_KNOWN_TURNS:
            if len(self._expected) >= MAX_KNOWN_SHAPES:
                self._expected.clear()
            self._expected[shape] = expected


def _supervised(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """Which tokens start inside a supervised span. Both lists are in the order of the text."""
    mask, remaining = [], iter(spans)
    start, end = next(remaining, (0, 0))
    for token_start, token_end in offsets:
        while token_start >= end and (following := next(remaining, None)) is not None:
            start, end = following
        mask.append(start <= token_start < end and token_end > token_start)
    return mask


def _text_tokens(ids: list[int], supervised: list[bool], image_id: int) -> TextTokens:
    tokens: list[int] = []
    labels: list[int] = []
    image_offsets: list[int] = []
    for index, is_supervised in zip(ids, supervised, strict=True):
        if index == image_id:
            image_offsets.append(len(tokens))
            continue
        if tokens:
            labels.append(index if is_supervised else IGNORED_LABEL)
        tokens.append(index)
    labels.append(IGNORED_LABEL)
    return TextTokens(tokens, labels, tuple(image_offsets))

"""From a LLaVA/ShareGPT4V row to a typed conversation.

The rules are LLaVA's: a leading answer is dropped, roles alternate, and a turn's single `<image>`
is moved to its front on a line of its own. Several placeholders in one turn stay where they are
(LLaVA-NeXT), because their places carry meaning. The text is otherwise the writer's.
"""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_dattn.data.rejection import Reason, SampleError

IMAGE_TOKEN = "<image>"

_ROLES: dict[str, Literal["user", "assistant"]] = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Turn:
    """One utterance; `text` holds `num_images` placeholders."""

    role: Literal["user", "assistant"]
    text: str
    num_images: int = 0


@dataclass(frozen=True)
class Conversation:
    """Questions and answers in turn (question first, answer last) and the images they speak of."""

    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat templates expect it."""
        return [{"role": turn.role, "content": turn.text} for turn in self.turns]

    @property
    def answers(self) -> tuple[str, ...]:
        return tuple(turn.text for turn in self.turns if turn.role == "assistant")

    def without_last_exchange(self) -> "Conversation":
        """The conversation up to the previous answer, with the images it still speaks of."""
        turns = self.turns[:-2]
        return Conversation(turns, self.images[: sum(turn.num_images for turn in turns)])


def parse_row(row: Any) -> Conversation:
    """Normalise one row of a LLaVA file.

    Raises:
        SampleError: the row cannot be used; its reason says why.
    """
    if not isinstance(row, dict):
        raise SampleError(Reason.BAD_ROW, f"a row must be an object, got {type(row).__name__}")
    images = _images(row)
    turns = tuple(_turn(role, text) for role, text in _utterances(row))
    placeholders = sum(turn.num_images for turn in turns)
    if placeholders != len(images):
        raise SampleError(
            Reason.IMAGE_COUNT,
            f"{placeholders} {IMAGE_TOKEN} placeholders for {len(images)} images",
        )
    return Conversation(turns, images)


def _images(row: dict[str, Any]) -> tuple[str, ...]:
    if row.get("video") is not None:
        raise SampleError(Reason.BAD_ROW, "the row has a video; only images are supported")
    image = row.get("image")
    if image is None:
        return ()
    paths = image if isinstance(image, list) else [image]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise SampleError(Reason.BAD_ROW, f"'image' must name files, got {path!r:.80}")
    return tuple(paths)


def _utterances(row: dict[str, Any]) -> list[tuple[Literal["user", "assistant"], str]]:
    """Roles and texts, checked: they alternate, start with a question and end with an answer."""
    entries = row.get("conversations")
    if not isinstance(entries, list) or not entries:
        raise SampleError(Reason.BAD_ROW, "'conversations' must be a list of turns")
    utterances = [_utterance(entry) for entry in entries]
    if utterances[0][0] == "assistant":
        utterances = utterances[1:]
    if all(role == "user" for role, _ in utterances):
        raise SampleError(Reason.NO_ANSWER, "the conversation has a question but no answer")
    for index, (role, _) in enumerate(utterances):
        if role != ("user", "assistant")[index % 2]:
            raise SampleError(Reason.ODD_ROLES, f"two {role} turns follow each other")
    if utterances[-1][0] == "user":
        raise SampleError(Reason.NO_ANSWER, "the last question has no answer")
    return utterances


def _utterance(entry: Any) -> tuple[Literal["user", "assistant"], str]:
    if not isinstance(entry, dict) or not isinstance(entry.get("value"), str):
        raise SampleError(Reason.BAD_ROW, "a turn must be an object with 'from' and a text 'value'")
    role = entry.get("from")
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleError(Reason.ODD_ROLES, f"unknown role {role!r:.80}; LLaVA has human and gpt")
    try:
        entry["value"].encode()
    except UnicodeEncodeError as error:
        raise SampleError(Reason.BAD_ROW, f"the text is not valid Unicode: {error}") from error
    return _ROLES[role], entry["value"]


def _turn(role: Literal["user", "assistant"], text: str) -> Turn:
    num_images = text.count(IMAGE_TOKEN)
    if role == "assistant":
        if num_images:
            raise SampleError(Reason.CONTROL_TOKEN, f"an answer contains {IMAGE_TOKEN}")
        if not text.strip():
            raise SampleError(Reason.EMPTY_ANSWER, "an answer is empty")
        return Turn(role, text.strip())
    if num_images == 1:
        text = f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()
    return Turn(role, text, num_images)

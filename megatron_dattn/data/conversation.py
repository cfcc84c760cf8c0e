"""From a LLaVA/ShareGPT4V record, or a list of chat messages, to a typed conversation.

The rules are LLaVA's: a leading answer is dropped, roles alternate, and a turn's single `<image>`
is moved to its front on a line of its own. Several placeholders in one turn stay where they are
(LLaVA-NeXT), because their places carry meaning. The text is otherwise the writer's. Where a record
has videos, `<video>` is a placeholder too; where it has nothing else, `<image>` may stand for them
(LLaVA-Video). What else may be fixed, where `data.policies` says so, stands in turn_fixes.py.

A system message comes as a first turn from `system`, or for all turns in the record's `system`
(ShareGPT's two ways; the turn goes before the key). An empty one is none, and so is an `image` or
`video` that is there but empty.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from megatron_dattn.data.chat_messages import IMAGE_TOKEN as IMAGE_TOKEN
from megatron_dattn.data.chat_messages import as_llava
from megatron_dattn.data.policies import Fixes
from megatron_dattn.data.problems import FIXED_BY_DEFAULT
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.turn_fixes import (
    Role,
    known_roles,
    question,
    with_answers,
    with_placeholders,
    with_videos,
)
from megatron_dattn.data.turn_fixes import Turn as Turn
from megatron_dattn.data.videos import Video
from megatron_dattn.errors import quoted

_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """Questions and answers in turn (question first, answer last) and the images they speak of."""

    turns: tuple[Turn, ...]
    images: tuple[str | Video, ...] = ()
    """What the placeholders stand for, in their order."""
    system: str | None = None
    """What the assistant is told before the first question."""
    fixed: frozenset[Reason] = field(default=frozenset(), compare=False)
    """Problems that were fixed on the way here."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat templates expect it."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [{"role": turn.role, "content": turn.text} for turn in self.turns]

    @property
    def answers(self) -> tuple[str, ...]:
        return tuple(turn.text for turn in self.turns if turn.role == "assistant")

    @property
    def num_exchanges(self) -> int:
        """Questions with their answers."""
        return len(self.turns) // 2

    def first_exchanges(self, count: int) -> "Conversation":
        """The conversation up to an answer, with the images it still speaks of."""
        turns = self.turns[: 2 * count]
        images = self.images[: sum(turn.num_images for turn in turns)]
        return replace(self, turns=turns, images=images)


def parse_record(record: Any, fixing: frozenset[Reason] = FIXED_BY_DEFAULT) -> Conversation:
    """Normalise one record.

    Args:
        fixing: problems that are fixed where their fix applies.

    Raises:
        SampleError: the record cannot be used; its reason says why.
    """
    if not isinstance(record, dict):
        raise SampleError(
            Reason.BAD_RECORD, f"a record must be an object, got {type(record).__name__}"
        )
    fixes = Fixes(fixing)
    record = as_llava(known_roles(record, fixes))
    images: tuple[str | Video, ...] = _images(record)
    videos = _videos(record)
    system, entries = _system(record)
    utterances = _utterances(entries, fixes)
    if videos:
        utterances, images = with_videos(utterances, images, videos, fixes)
    turns = [_turn(role, text, fixes) for role, text in utterances]
    turns, images = with_answers(with_placeholders(turns, len(images), fixes), images)
    return Conversation(tuple(turns), images, system, frozenset(fixes.made))


def image_paths(record: dict[str, Any]) -> tuple[str, ...]:
    """The files that a record names, as it names them: its images, and its videos or their frames.

    Raises:
        SampleError: it has something that is no path.
    """
    record = as_llava(record)
    return _images(record) + tuple(path for video in _videos(record) for path in video.paths)


def _images(record: dict[str, Any]) -> tuple[str, ...]:
    paths, more = _named(record, "image"), _named(record, "images")
    if paths and more and paths != more:
        raise SampleError(Reason.BAD_RECORD, "the record has 'image' and 'images', which differ")
    return _paths("image", paths or more)


def _videos(record: dict[str, Any]) -> tuple[Video, ...]:
    """`video` is a file or the list of a video's frames, `videos` a list of such."""
    one, several = _named(record, "video"), _named(record, "videos")
    if one and several:
        raise SampleError(Reason.BAD_RECORD, "the record has 'video' and 'videos'")
    if one and isinstance(record["video"], list):
        several = [one]
    return tuple(_video(each) for each in several or one)


def _video(named: Any) -> Video:
    frames = named if isinstance(named, list) else [named]
    if not frames:
        raise SampleError(Reason.BAD_RECORD, "a video is an empty list of frames")
    return Video(_paths("video", frames), is_file=named is not frames)


def _paths(key: str, paths: list[Any]) -> tuple[str, ...]:
    for path in paths:
        if not isinstance(path, str):
            raise SampleError(Reason.BAD_RECORD, f"'{key}' must name files, got {quoted(path)}")
    return tuple(paths)


def _named(record: dict[str, Any], key: str) -> list[Any]:
    """What a key names, one thing or a list of them; data sets write "nothing" in many ways."""
    value = record.get(key)
    values = value if isinstance(value, list) else [value]
    return [v for v in values if v is not None and not (isinstance(v, str) and not v.strip())]


def _system(record: dict[str, Any]) -> tuple[str | None, list[Any]]:
    """The system message, and the turns without it."""
    entries = record.get("conversations")
    if not isinstance(entries, list) or not entries:
        raise SampleError(Reason.BAD_RECORD, "'conversations' must be a list of turns")
    text = record.get("system")
    if isinstance(entries[0], dict) and entries[0].get("from") == "system":
        text, entries = _text(entries[0]), entries[1:]
    if text is not None and not isinstance(text, str):
        raise SampleError(Reason.BAD_RECORD, f"'system' must be a text, got {quoted(text)}")
    if text is None or not text.strip():
        return None, entries
    require_unicode(text)
    if IMAGE_TOKEN in text:
        raise SampleError(Reason.CONTROL_TOKEN, f"the system message contains {IMAGE_TOKEN}")
    return text, entries


def _utterances(entries: list[Any], fixes: Fixes) -> list[tuple[Role, str]]:
    """Roles and texts, checked: they alternate, start with a question and end with an answer, or
    with a question that is to be dropped."""
    utterances = [_utterance(entry) for entry in entries]
    if utterances and utterances[0][0] == "assistant":
        fixes.settle(Reason.LEADING_ANSWER, "the conversation begins with an answer")
        utterances = utterances[1:]
    if all(role == "user" for role, _ in utterances):
        raise SampleError(Reason.NO_ANSWER, "the conversation has no answer to a question")
    for index, (role, _) in enumerate(utterances):
        if role != ("user", "assistant")[index % 2]:
            raise SampleError(Reason.ODD_ROLES, f"two {role} turns follow each other")
    if utterances[-1][0] == "user":
        fixes.settle(Reason.NO_ANSWER, "the last question has no answer")
    return utterances


def _utterance(entry: Any) -> tuple[Role, str]:
    text = _text(entry)
    role = entry.get("from")
    if role == "system":
        raise SampleError(Reason.ODD_ROLES, "a system message stands behind the first turn")
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleError(
            Reason.ODD_ROLES, f"unknown role {quoted(role)}; LLaVA has human, gpt and system"
        )
    require_unicode(text)
    return _ROLES[role], text


def _text(entry: Any) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("value"), str):
        raise SampleError(
            Reason.BAD_RECORD, "a turn must be an object with 'from' and a text 'value'"
        )
    return entry["value"]


def require_unicode(text: str) -> None:
    """Raise SampleError for a text that no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(
            Reason.BAD_RECORD, f"a text holds half a character at place {error.start}"
        ) from error


def _turn(role: Role, text: str, fixes: Fixes) -> Turn:
    if role == "user":
        return question(text)
    if IMAGE_TOKEN in text:
        raise SampleError(Reason.CONTROL_TOKEN, f"an answer contains {IMAGE_TOKEN}")
    if not text.strip():
        fixes.settle(Reason.EMPTY_ANSWER, "an answer is empty")
    return Turn("assistant", text.strip())

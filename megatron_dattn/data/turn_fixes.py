"""A conversation's turns, and the fixes that `data.policies` may ask for: odd spellings of roles,
placeholders and images that do not match, questions without an answer.

Each fix leaves what a careful writer of the same record would have written; what is beyond that is
an error here as it is without a fix.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_dattn.data.chat_messages import IMAGE_TOKEN, VIDEO_TOKEN
from megatron_dattn.data.policies import Fixes
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.videos import Video

Role = Literal["user", "assistant"]

_PLACEHOLDER = re.compile(f"{IMAGE_TOKEN}|{VIDEO_TOKEN}")
_QUESTION, _ANSWER, _SYSTEM = range(3)
_SPELLINGS = {
    **dict.fromkeys(("human", "user"), _QUESTION),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "bard", "bing"), _ANSWER),
    **dict.fromkeys(("system", "developer"), _SYSTEM),
}
_NAMES = {
    # key of the record, key of a turn: names of question, answer and system message
    ("conversations", "from"): ("human", "gpt", "system"),
    ("messages", "role"): ("user", "assistant", "system"),
}


@dataclass(frozen=True)
class Turn:
    """One utterance; `text` holds `num_images` placeholders."""

    role: Role
    text: str
    num_images: int = 0


def known_roles(record: dict[str, Any], fixes: Fixes) -> dict[str, Any]:
    """A record in which other spellings of a role are the form's own, if that may be fixed."""
    if Reason.ODD_ROLES not in fixes.allowed:
        return record
    for (key, role), names in _NAMES.items():
        if isinstance(record.get(key), list):
            turns = [_with_known_role(turn, role, names) for turn in record[key]]
            if turns != record[key]:
                fixes.made.add(Reason.ODD_ROLES)
                record = {**record, key: turns}
    return record


def _with_known_role(turn: Any, key: str, names: tuple[str, ...]) -> Any:
    role = turn.get(key) if isinstance(turn, dict) else None
    if not isinstance(role, str) or role in names:
        return turn
    known = _SPELLINGS.get(role.strip().lower())
    return turn if known is None else {**turn, key: names[known]}


def question(text: str) -> Turn:
    """A question; its only placeholder goes to the front, on a line of its own.

    Raises:
        SampleError: what stood around the placeholder spells another one without it.
    """
    num_images = text.count(IMAGE_TOKEN)
    if num_images == 1:
        rest = text.replace(IMAGE_TOKEN, "")
        if IMAGE_TOKEN in rest:
            message = f"a question spells another {IMAGE_TOKEN} around its placeholder"
            raise SampleError(Reason.CONTROL_TOKEN, message)
        text = f"{IMAGE_TOKEN}\n{rest.strip()}".strip()
    return Turn("user", text, num_images)


def with_videos(
    utterances: list[tuple[Role, str]],
    images: tuple[str | Video, ...],
    videos: tuple[Video, ...],
    fixes: Fixes,
) -> tuple[list[tuple[Role, str]], tuple[str | Video, ...]]:
    """Roles and texts with one kind of placeholder, and what these stand for in their order.

    Raises:
        SampleError: those of a kind are fewer than what they stand for, or may not be more.
    """
    asked = "\n".join(text for role, text in utterances if role == "user")
    counts = Counter(_PLACEHOLDER.findall(asked))
    if not images and not counts[VIDEO_TOKEN]:
        return utterances, videos  # whose number is judged as that of images is
    message = (
        f"{counts[IMAGE_TOKEN]} {IMAGE_TOKEN} for {len(images)} images and "
        f"{counts[VIDEO_TOKEN]} {VIDEO_TOKEN} for {len(videos)} videos"
    )
    if counts[IMAGE_TOKEN] < len(images) or counts[VIDEO_TOKEN] < len(videos):
        raise SampleError(Reason.IMAGE_COUNT, message)
    if counts.total() > len(images) + len(videos):
        fixes.settle(Reason.EXTRA_PLACEHOLDER, message)
    left = {IMAGE_TOKEN: iter(images), VIDEO_TOKEN: iter(videos)}
    shown: list[str | Video] = []

    def placeholder(found: re.Match[str]) -> str:
        each = next(left[found[0]], None)
        if each is None:
            return ""
        shown.append(each)
        return IMAGE_TOKEN

    matched = list[tuple[Role, str]]()
    for role, text in utterances:
        if role == "user":
            number = len(shown) + len(_PLACEHOLDER.findall(text))
            text = _PLACEHOLDER.sub(placeholder, text)
            text = text.strip() if len(shown) < number else text
        matched.append((role, text))
    return matched, tuple(shown)


def with_placeholders(turns: list[Turn], num_images: int, fixes: Fixes) -> list[Turn]:
    """The turns with as many placeholders as there are images.

    Raises:
        SampleError: they have others, and that may not or cannot be fixed.
    """
    placeholders = sum(turn.num_images for turn in turns)
    message = f"{placeholders} {IMAGE_TOKEN} placeholders for {num_images} images"
    if placeholders > num_images:
        fixes.settle(Reason.EXTRA_PLACEHOLDER, message)
        return _without_surplus(turns, num_images)
    if placeholders < num_images:
        if (placeholders, num_images) != (0, 1):  # where the others belong nobody knows
            raise SampleError(Reason.IMAGE_COUNT, message)
        fixes.settle(Reason.IMAGE_COUNT, message)
        return [_behind_images(turns[0], 1), *turns[1:]]
    return turns


def _without_surplus(turns: list[Turn], num_images: int) -> list[Turn]:
    kept = []
    for turn in turns:
        left = min(turn.num_images, num_images)
        num_images -= left
        if left < turn.num_images:
            parts = turn.text.split(IMAGE_TOKEN)
            text = IMAGE_TOKEN.join(parts[: left + 1]) + "".join(parts[left + 1 :])
            turn = question(text.strip())
        kept.append(turn)
    return kept


def _behind_images(turn: Turn, num_images: int) -> Turn:
    """A question behind further images, each on a line of its own."""
    text = f"{IMAGE_TOKEN}\n" * num_images + turn.text
    return replace(turn, text=text.strip(), num_images=turn.num_images + num_images)


def with_answers(
    turns: list[Turn], images: tuple[str | Video, ...]
) -> tuple[list[Turn], tuple[str | Video, ...]]:
    """The exchanges whose question has an answer, and the images that they speak of.

    The images of an exchange that is left out go to the next question: those behind may be about
    them. Where no question follows they are left out too.

    Raises:
        SampleError: no exchange is left.
    """
    kept: list[Turn] = []
    waiting = 0  # images of questions that were left out
    for asked, answer in zip(turns[::2], turns[1::2], strict=False):
        if answer.text:
            kept += [_behind_images(asked, waiting) if waiting else asked, answer]
            waiting = 0
        else:
            waiting += asked.num_images
    if not kept:
        raise SampleError(Reason.EMPTY_ANSWER, "every answer is empty")
    return kept, images[: sum(turn.num_images for turn in kept)]

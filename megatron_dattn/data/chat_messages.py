"""Records as lists of chat messages (OpenAI's form, ChatML, TRL), read as LLaVA's.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"},
                                               {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A cat."}]}

Content is a text, in which `<image>` stands for an image, or a list of parts. An image part names
its file itself, or takes the next one of the record's `images`; so does a video part, whose `video`
may be a list of frames.
"""

from collections.abc import Iterator
from typing import Any

from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.errors import quoted

IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<video>"

# By kind, what its parts of the messages name; None for the record's next.
_Named = dict[str, list[Any]]
_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}


def as_llava(record: dict[str, Any]) -> dict[str, Any]:
    """A record with `conversations` in the place of `messages`; other records as they are.

    Raises:
        SampleError: the messages are none, or name images in two ways.
    """
    messages = record.get("messages")
    if messages is None or record.get("conversations") is not None:
        return record
    if not isinstance(messages, list):
        raise SampleError(Reason.BAD_RECORD, "'messages' must be a list of messages")
    named: _Named = {"image": [], "video": []}
    turns = [_turn(message, named) for message in messages]
    new: dict[str, Any] = {"conversations": turns}
    for kind, files in named.items():
        own = [file for file in files if file is not None]
        if own and (len(own) < len(files) or record.get(kind) or record.get(f"{kind}s")):
            raise SampleError(
                Reason.IMAGE_COUNT,
                f"some {kind}s are named by their part of a message and others by the record",
            )
        # `<video>` is a placeholder only where there are videos.
        if kind == "video" and files and not (own or record.get("video") or record.get("videos")):
            raise SampleError(Reason.IMAGE_COUNT, "a message has a video, but no video is named")
        if own:
            new[f"{kind}s"] = own
    others = {key: value for key, value in record.items() if key != "messages"}
    return {**others, **new}


def _turn(message: Any, named: _Named) -> dict[str, str]:
    """A message as a turn; the files that its image and video parts name go to `named`."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), str | list):
        raise SampleError(
            Reason.BAD_RECORD, "a message must be an object with 'role' and a text or parts"
        )
    role, content = message.get("role"), message["content"]
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleError(
            Reason.ODD_ROLES,
            f"unknown role {quoted(role)}; messages have user, assistant and system",
        )
    text = content if isinstance(content, str) else "".join(_texts(content, named))
    return {"from": _ROLES[role], "value": text}


def _texts(parts: list[Any], named: _Named) -> Iterator[str]:
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield part["text"]
        elif kind in ("image", "image_url"):
            named["image"].append(_path(part))
            yield f"{IMAGE_TOKEN}\n"
        elif kind == "video":
            named["video"].append(part["video"] if "video" in part else _path(part))
            yield f"{VIDEO_TOKEN}\n"
        else:
            raise SampleError(
                Reason.BAD_RECORD,
                f"content may have parts of type text, image and video, got {quoted(part)}",
            )


def _path(part: dict[str, Any]) -> str | None:
    """The file that an image part names, in one of the ways that are about."""
    for key in ("image", "path", "url", "image_url"):
        value = part.get(key)
        if isinstance(value, dict):
            value = value.get("url") or value.get("path")
        if value is None:
            continue
        if not isinstance(value, str):
            raise SampleError(Reason.BAD_RECORD, f"'{key}' must name a file, got {quoted(value)}")
        return value
    return None

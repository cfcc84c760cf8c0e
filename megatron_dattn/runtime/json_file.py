"""Reads JSON that this program did not write, or that something has happened to since.

Python's parser takes what no such file needs and what then breaks elsewhere: lists nested until the
stack is full, integers of thousands of digits, keys that occur twice, half a surrogate pair. Here
each is one error. Single values are taken out with `json_fields.py`.
"""

import json
import os
from typing import Any

from megatron_dattn.errors import UserError
from megatron_dattn.runtime.json_fields import show
from megatron_dattn.runtime.plain_file import read_plain

MAX_BYTES = 64 * 2**20
"""The largest that we know are tokenizers with 256k entries: 33 MB."""
MAX_DEPTH = 64
# Hugging Face writes "no limit" as int(1e30). With fewer than 300 digits all fit a float.
_MAX_DIGITS = 100


def parse_json(data: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or one that is not sane; the message says why, without the file.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), parse_int=_integer, object_pairs_hook=_without_doubles
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    _check_tree(value)
    return value


def read_json_object(
    path: str | os.PathLike[str],
    error: type[UserError],
    *,
    max_bytes: int = MAX_BYTES,
    follow_links: bool = True,
) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        error: what is raised for a file that is there and is not what it should be.
        max_bytes: how large it may be.
        follow_links: whether it may be a link to the file.

    Raises:
        FileNotFoundError: left to the caller, who knows what that means.
        UserError: of the given class; names the file and the reason.
    """
    try:
        data = read_plain(path, max_bytes=max_bytes, follow_links=follow_links)
    except FileNotFoundError:
        raise
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror}") from failure
    try:
        value = parse_json(data)
    except ValueError as failure:  # UnicodeDecodeError and JSONDecodeError are such
        raise error(f"{path} is not valid JSON ({failure})") from None
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it holds an integer of {len(digits)} digits")
    return int(digits)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; programs differ in which of two values they take for the same key."""
    content = dict(pairs)
    if len(content) < len(pairs):
        for key, value in pairs:
            if content[key] != value:
                raise ValueError(f"it has the key {show(key)} twice, with different values")
    return content


def _check_tree(value: Any) -> None:
    """Raise ValueError if a value is nested too deep, or holds text that cannot be written."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.keys()
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str) and not item.isascii():
                _check_text(item)
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"it holds half of a surrogate pair: {show(text)}") from None

"""Reads files that this program did not write, or that something has happened to since.

Plain files only, and none that makes us wait: a named pipe in the place of a file is waited for as
long as nobody writes into it, a device such as /dev/zero has no end, and both have size 0. What a
file is gets looked at before it is opened, and once more when it is open: it may have been
exchanged in between.

Python's JSON parser takes what no such file needs and what then breaks elsewhere: lists nested
until the stack is full, integers of thousands of digits, keys that occur twice, half a surrogate
pair. Here each is one error, and so is a value of another type than the reader needs
(`JsonFields`).
"""

import errno
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron_dattn.errors import UserError

_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_plain(path: str | os.PathLike[str], *, follow_links: bool = True) -> BinaryIO:
    """Open a plain file to be read.

    Args:
        follow_links: whether a link to a plain file counts as one, as in Hugging Face's cache.

    Raises:
        OSError: it is not there, cannot be read, or is something else; `strerror` says what.
    """
    _require_plain(os.stat(path, follow_symlinks=follow_links), path)
    # A pipe that came in between is not waited for either.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        _require_plain(os.fstat(descriptor), path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_plain(path: str | os.PathLike[str], *, max_bytes: int, follow_links: bool = True) -> bytes:
    """All of a plain file.

    Raises:
        OSError: as for `open_plain`; also if it has more bytes than that.
    """
    with open_plain(path, follow_links=follow_links) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1) if size <= max_bytes else b""
        if len(data) > size:  # some plain files (those of /proc) have more than their size says
            data += file.read(max_bytes + 1 - len(data))
    if max(size, len(data)) > max_bytes:
        reason = f"it has more than the {max_bytes:,} bytes that such a file may have"
        raise OSError(errno.EFBIG, reason, os.fspath(path))
    return data


def _require_plain(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = next((name for test, name in _KINDS if test(status.st_mode)), "of an unknown kind")
    raise OSError(errno.EINVAL, f"it is {kind}, not a plain file", os.fspath(path))


MAX_BYTES = 64 * 2**20
"""The largest that we know are tokenizers with 256k entries: 33 MB."""
MAX_DEPTH = 64
# Hugging Face writes "no limit" as int(1e30). With fewer than 300 digits all fit a float.
_MAX_DIGITS = 100
_SHOWN = 80


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


@dataclass(frozen=True)
class JsonFields:
    """An object out of a JSON file, or a section of one; its values, each of the type asked for."""

    values: Mapping[str, Any]
    where: str
    """What messages call it."""
    error: type[UserError]
    """What all methods raise for a value that is missing or of another type."""

    def whole(self, name: str, *, least: int | None = None) -> int:
        """A whole number, not below `least`."""
        value = self.present(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "a whole number")
        if least is not None and value < least:
            raise self.wrong(name, f"a whole number of at least {least}")
        return value

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.present(name)
        if not is_number(value):
            raise self.wrong(name, "a number")
        return float(value)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of so many finite numbers."""
        value = self.present(name)
        is_list = isinstance(value, list | tuple) and len(value) == count
        if not is_list or not all(map(is_number, value)):
            raise self.wrong(name, f"{count} numbers")
        return tuple(map(float, value))

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.present(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str) -> str:
        """A string."""
        value = self.present(name)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def section(self, name: str) -> dict[str, Any]:
        """An object."""
        value = self.present(name)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return value

    def present(self, name: str) -> Any:
        """Any value, which must be there."""
        if name not in self.values:
            raise self.error(f"{self.where} lacks {name}")
        return self.values[name]

    def wrong(self, name: str, expected: str) -> UserError:
        """The error that says what a value must be."""
        value = show(self.values[name])
        return self.error(f"{self.where} has {name} {value}, but it must be {expected}")


def is_number(value: Any) -> bool:
    """True if a value is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def show(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

"""The errors that a user can cause and mend.

Entry points catch `UserError`, print it as one line and exit with `EXIT_USER_ERROR`; every other
exception is a bug of ours and keeps its traceback. A message names the offending values and the
remedy.
"""

import difflib
from collections.abc import Collection

EXIT_USER_ERROR = 2
MAX_MESSAGE = 600  # characters


def shortened(text: str, limit: int) -> str:
    """A text of at most `limit` characters: its beginning and end, and how long it was.

    What users name (paths, roles, ids) can be anything, a picture spelled out in letters too.
    """
    if len(text) <= limit:
        return text
    cut = f" ...({len(text)} characters)... "
    ends = limit - len(cut)
    head = ends - ends // 3
    return text[:head] + cut + text[len(text) - (ends - head) :]


def quoted(value: object, limit: int = 80) -> str:
    """A value in quotes as Python writes it, so that no control character gets through."""
    if isinstance(value, str):  # before it is written out: repr of a long text is longer still
        value = shortened(value, limit)
    return shortened(repr(value), limit + 2)


def nearest_name(name: str, known: Collection[str]) -> str | None:
    """The name that a misspelled or shortened one most probably stands for; None if it is far."""
    longer = [full for full in known if full.startswith(name)]
    if longer:
        return min(longer, key=len)
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.75)), None)


class UserError(ValueError):
    """Something outside the program is wrong: a flag, a file, a machine too small.

    The message is cut in its middle if it is longer than a person reads.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message, MAX_MESSAGE))


class ConfigError(UserError):
    """A configuration value, or a combination of values, that cannot work."""


class DataError(UserError):
    """A data set, a sample or an image that cannot be used."""


class OutageError(DataError):
    """The data cannot be read now, by no fault of its own: another try may succeed."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, does not fit, or cannot be written."""


class DiskFullError(CheckpointError):
    """The disk has no room for what was to be written."""

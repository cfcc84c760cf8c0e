"""Writing any text to a terminal or a log, whatever its encoding.

A file's name may hold bytes that are no text, and a stream may be of an encoding that lacks a
letter. Python would end a program in the middle of a line.
"""

import io
from typing import TextIO


def escape_what_cannot_be_written(stream: TextIO) -> None:
    """From now on write such characters as escapes, `\\udcff`."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")

"""How far a pass over gigabytes is: code that takes minutes tells, an entry point shows.

Whoever reads or writes that much takes a `ByteProgress`, begins a pass with it, and tells it of the
bytes of each part that is done. `tool.py` has a bar for the terminal.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], object]
"""Is told the bytes of a part that is done."""


class ByteProgress(Protocol):
    """Begins a pass over so many bytes, which ends with the context."""

    def __call__(self, what: str, num_bytes: int) -> AbstractContextManager[Advance]: ...


@contextmanager
def unseen(what: str, num_bytes: int) -> Iterator[Advance]:
    """Nobody looks."""
    yield lambda done: None

"""A `Progress` that remembers every pass: what it was, how much was announced and told."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_dattn.runtime.progress import Advance


class Passes:
    """Hand it over as a `progress`; `seen` then has one list [what, announced, told] per pass."""

    def __init__(self) -> None:
        self.seen: list[list[str | int]] = []

    @contextmanager
    def __call__(self, what: str, num_bytes: int) -> Iterator[Advance]:
        told: list[int] = []
        yield told.append
        self.seen.append([what, num_bytes, sum(told)])

    def check(self, *names: str) -> None:
        """Each pass by the beginning of its name, in order, with all that was announced done."""
        assert len(self.seen) == len(names), self.seen
        for name, (what, announced, told) in zip(names, self.seen, strict=True):
            assert str(what).startswith(name), self.seen
            assert announced == told, self.seen
            assert int(told) > 0, self.seen

"""What every test may rely on."""

import logging
from collections.abc import Iterator

import pytest
from hypothesis import settings

# By default an example that takes longer than 200 ms fails: on a busy machine any may.
settings.register_profile("whenever", deadline=None)
settings.load_profile("whenever")


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A command that a test ran sent the log to that test's output: not to the next one's."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)

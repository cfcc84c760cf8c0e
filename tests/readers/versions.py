"""The versions of transformers that exports are read with: the list that documents and code obey.

What the exported code refuses (`hf/versions_dattn.py`), what pyproject.toml allows and what
docs/huggingface.md promises are held to this list by `tests/unit/hf/test_versions.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reader:
    """A version, and which exports it reads."""

    version: str
    stock_only: bool = False
    """Only the stock LLaVA; the code that other exports bring along needs a newer version."""


READERS = (
    Reader("4.57.6", stock_only=True),  # the last of the versions 4
    Reader("5.10.1"),  # the oldest for our code
    Reader("5.23.0"),  # requirements.lock's
    Reader("5.24.0"),  # the newest on the index
)
NEWEST = READERS[-1].version
LOCKED = "5.23.0"
# What readers have besides; torch and the rest are those of the environment that made the exports.
COMPANIONS = ("accelerate==1.15.0", "peft==0.21.2")

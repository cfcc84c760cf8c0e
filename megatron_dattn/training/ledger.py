"""The sample ledger: which samples each step really consumed, one JSON line per step.

One file per data-parallel rank. It is the evidence that a resumed run reads exactly the samples
that the uninterrupted one would have read, and the place to look for a sample that hurt.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path


class SampleLedger:
    """Appends `{"step", "packs": [[key, ...], ...]}` lines; every line reaches the file at once."""

    def __init__(self, folder: str | Path, data_parallel_rank: int, resumed_step: int) -> None:
        """Open the rank's file; lines of steps that a resumed run will do again are dropped.

        Args:
            resumed_step: steps that the loaded checkpoint had done; 0 for a new run.
        """
        self._path = Path(folder) / f"samples-dp{data_parallel_rank:05d}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(self._path) if line["step"] <= resumed_step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(_encode(line) for line in kept), encoding="utf-8")
        os.replace(temporary, self._path)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, packs: Iterable[list[str]]) -> None:
        """Note the sample keys of one step, pack by pack."""
        self._file.write(_encode({"step": step, "packs": list(packs)}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_ledger(path: str | Path) -> dict[int, list[list[str]]]:
    """Step -> sample keys of its packs, from one rank's file."""
    return {line["step"]: line["packs"] for line in _lines(Path(path))}


def _encode(line: dict) -> str:
    return json.dumps(line) + "\n"


def _lines(path: Path) -> list[dict]:
    """The whole lines of a ledger; a last one that a dying process left unfinished is ignored."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

"""A stage that goes on with other data-parallel ranks and loader processes: the real program.

2 ranks without loader processes, then 1 rank with 2, then 2 with 1 each: every run goes back to a
checkpoint before the end of the former one, as after a crash.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

from megatron_dattn.training.sample_ledger import read_ledger
from tests.functional.workspace import make_workspace, run_main
from tests.support.distributed import run_distributed

RECORDS = 40
STEPS = 12
RUNS = [(2, 0, 12), (1, 2, 4), (2, 1, 7)]
"""Ranks, loader processes per rank, and the step that the run goes on from, or its last."""


def test_no_sample_is_lost_or_repeated(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, train_iters=STEPS)
    folder = tmp_path / "run"
    for ranks, workers, first in RUNS:
        for later in range(first + 1, STEPS + 1):
            shutil.rmtree(folder / f"step-{later:07d}", ignore_errors=True)
        flags = workspace.flags(save_interval=1, keep_last=20, num_workers=workers)
        assert run_distributed(run_main, ranks, flags) == [(0, "")] * ranks
    report = json.loads((folder / "resume_report.json").read_text())
    assert (report["step"], report["data"]) == (7, "dealt anew")

    steps: dict[int, list[str]] = {}
    for rank in range(2):
        ledger = read_ledger(folder / "ledger" / f"samples-dp{rank:05d}.jsonl")
        assert sorted(ledger) == list(range(1, STEPS + 1)), "whole, also where a rank was away"
        if rank:
            assert not any(ledger[step] for step in (5, 6, 7))
        for step, packs in ledger.items():
            steps.setdefault(step, []).extend(key for pack in packs for key in pack)
    shown = [key for step in range(1, STEPS + 1) for key in steps[step]]
    counts = Counter(shown)
    # Two epochs and a bit. Streams come to an epoch's end at different times, some packs apart.
    assert len(counts) == RECORDS
    assert set(Counter(shown[: RECORDS - 16]).values()) == {1}
    assert set(Counter(shown[: 2 * RECORDS - 16]).values()) <= {1, 2}
    assert set(shown[: RECORDS + 16]) == set(counts)

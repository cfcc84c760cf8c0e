"""A whole run that loses a rank ends in one line on the others, and in a file that says so."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.functional.workspace import ROOT, Workspace, environment, make_workspace


def _start_rank(rank: int, port: int, flags: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Without torchrun, which would end all ranks when the first has ended."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "pretrain_vlm.py"), *flags],
            env={**environment(), **place},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "accident"), [(1, signal.SIGKILL), (0, signal.SIGSTOP)], ids=["killed", "frozen"]
)
def test_the_other_rank_ends_in_one_line(
    tmp_path: Path, victim: int, accident: signal.Signals
) -> None:
    workspace: Workspace = make_workspace(tmp_path)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    flags = workspace.flags(train_iters=5000, distributed_timeout_minutes=0.15)
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(2)]
    ranks = [_start_rank(rank, port, flags, log) for rank, log in enumerate(logs)]
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "latest.json").exists():
            assert time.monotonic() < deadline, logs[0].read_text()
            time.sleep(0.05)
        os.kill(ranks[victim].pid, accident)
        code = ranks[1 - victim].wait(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    said = logs[1 - victim].read_text()
    assert code == 19, said
    assert "Traceback" not in said
    assert "frame #" not in said
    (line,) = [line for line in said.splitlines() if "does not answer" in line]
    assert f"rank {victim} " in line
    assert "iteration" in line
    note = json.loads((tmp_path / "run" / "exit_reason.json").read_text())
    assert (note["reason"], note["exit_code"]) == ("lost_rank", 19)
    assert note["detail"] in line

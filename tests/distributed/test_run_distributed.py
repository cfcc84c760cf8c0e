"""The test harness itself: values, failures, deaths and hangs of ranks."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.support.distributed import RankError, run_distributed


def add_ranks(offset: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = offset + dist.get_rank()
    dist.all_reduce(total)
    print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}")
    return dist.get_rank(), total


def test_returns_values_by_rank_and_shows_output(capsys: pytest.CaptureFixture[str]) -> None:
    results = run_distributed(add_ranks, 2, torch.tensor([5]))
    assert results == [(0, torch.tensor([11])), (1, torch.tensor([11]))]
    assert capsys.readouterr().out == "rank 0 of 2\nrank 1 of 2\n"


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("bad number 7")
    dist.barrier()


def test_a_failure_shows_the_traceback_of_its_rank() -> None:
    with pytest.raises(RankError, match=r"rank 1 failed\n(?s:.*)fail_on_rank_1(?s:.*)bad number 7"):
        run_distributed(fail_on_rank_1, 2)


def die_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_death_is_noticed_at_once() -> None:
    with pytest.raises(RankError, match="rank 0 died"):
        run_distributed(die_on_rank_0, 2)


def hang_with_a_child(pid_file: str) -> None:
    if dist.get_rank() == 1:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(pid_file, "w") as file:
            file.write(str(child.pid))
        time.sleep(600)
    dist.barrier()


def test_a_hang_shows_all_stacks_and_leaves_nobody_behind(tmp_path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(RankError) as error:
        run_distributed(hang_with_a_child, 2, str(pid_file), timeout=5)
    message = str(error.value)
    assert "no answer after 5 s from 2 ranks" in message
    assert "in barrier" in message
    assert message.count("in hang_with_a_child") == 2
    child = int(pid_file.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)

"""A rank that is killed, freezes or crashes is named by all the others, within bounded time."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
from dataclasses import dataclass
from multiprocessing import connection, process

import pytest
import torch
import torch.distributed as dist

from megatron_dattn.runtime import lost_ranks
from megatron_dattn.runtime.distributed import join_world
from megatron_dattn.runtime.lost_ranks import LostRankError, named_lost_ranks, tell_of_crash
from tests.support import distributed  # sets up the fork server

_context = multiprocessing.get_context("forkserver")
assert distributed
NUM_RANKS = 4  # so that most are no neighbours of the lost one
END_SECONDS = 60


@dataclass(frozen=True)
class Accident:
    """What happens to one rank while the others enter a collective."""

    victim: int
    by: signal.Signals | None = None
    """None for a crash."""
    timeout_seconds: float = 600.0
    """Of collectives."""


def _rank(rank: int, port: int, accident: Accident, answer: connection.Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(NUM_RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    os.dup2(answer.fileno(), 2)  # whatever torch has to say on its own account, too
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    lost_ranks.PATIENCE_SECONDS = 4.0  # a machine that is busy lets a rank wait for one or two
    join_world(timeout_seconds=accident.timeout_seconds)
    dist.barrier()
    try:
        with named_lost_ranks(lambda: "iteration 7"):
            if rank == accident.victim:
                _suffer(accident)
            dist.all_reduce(torch.ones(1))
    except LostRankError as error:
        print(error, file=sys.stderr)
    except KeyError as error:
        tell_of_crash(f"KeyError: {error}")


def _suffer(accident: Accident) -> None:
    if not accident.by:
        raise KeyError("colour")
    os.kill(os.getpid(), accident.by)


def said_by_rank(accident: Accident) -> list[str]:
    """What every rank wrote; all but the victim must have ended by themselves."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks: list[tuple[process.BaseProcess, connection.Connection]] = []
    for rank in range(NUM_RANKS):
        ours, theirs = _context.Pipe(duplex=False)
        ranks.append((_context.Process(target=_rank, args=(rank, port, accident, theirs)), ours))
        with contextlib.closing(theirs), distributed._fork_server_environment():
            ranks[-1][0].start()
    try:
        for rank, (child, _) in enumerate(ranks):
            if rank != accident.victim:
                child.join(END_SECONDS)
                assert child.exitcode == 0, f"rank {rank} did not end"
    finally:
        for child, _ in ranks:
            child.kill()
            child.join()
    return [os.read(ours.fileno(), 100_000).decode() for _, ours in ranks]


@pytest.mark.parametrize(
    "accident",
    [
        Accident(1, signal.SIGSTOP, timeout_seconds=6.0),
        Accident(0, signal.SIGSTOP, timeout_seconds=6.0),
        Accident(1, signal.SIGKILL),
        Accident(0, signal.SIGKILL),
        Accident(1),
        Accident(0),
    ],
    ids=lambda accident: f"{accident.by.name if accident.by else 'crash'}-{accident.victim}",
)
def test_all_the_others_name_it(accident: Accident) -> None:
    said = said_by_rank(accident)
    assert said.pop(accident.victim) == ""
    host = socket.gethostname()
    for line in said:
        assert line.count("\n") == 1, line
        assert len(line) < 650
        if not accident.by:
            start = f"rank {accident.victim} on {host} ended with KeyError: 'colour'; rank "
        elif accident.victim == 0:
            start = "rank 0 at 127.0.0.1:"
        else:
            start = f"rank {accident.victim} on {host} does not answer; rank "
        assert line.startswith(start)
        assert "does not answer" in line or not accident.by
        assert "was waiting in iteration 7 (" in line
        assert "distributed_timeout_minutes" in line

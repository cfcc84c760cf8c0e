"""Errors of one rank that all ranks raise, and those that stay where they struck."""

import os
import socket
from collections.abc import Callable

import pytest
import torch.distributed as dist

from megatron_dattn.errors import CheckpointError, ConfigError, DataError, UserError
from megatron_dattn.runtime.rank_errors import (
    all_ranks_agree,
    run_on_all_ranks,
    run_on_first_rank,
)
from tests.support.distributed import run_distributed

Outcome = tuple[type, str] | int | None


def rank_on_this_host(rank: int) -> str:
    return f"rank {rank} (host {socket.gethostname()})"


def fail_on(*errors: UserError | str | None) -> tuple[type, str] | None:
    try:
        all_ranks_agree(errors[dist.get_rank()])
    except UserError as error:
        return type(error), str(error)
    return None


def test_a_failure_of_one_rank_is_everybodys() -> None:
    assert run_distributed(fail_on, 2, None, None) == [None, None]
    one = run_distributed(fail_on, 2, None, CheckpointError("disk full"))
    assert one == [(CheckpointError, f"{rank_on_this_host(1)}: disk full")] * 2
    both = run_distributed(fail_on, 2, "no file", ConfigError("no flag"))
    assert both == [(UserError, f"{rank_on_this_host(0)}: no file (and 1 more failed)")] * 2
    alike = run_distributed(fail_on, 2, ConfigError("no flag"), ConfigError("no flag"))
    assert alike == [(ConfigError, "no flag")] * 2


def do_work() -> list[Outcome]:
    """What work ends with: that of rank 1 in three ways, then that of rank 0 alone."""
    rank = dist.get_rank()

    def raise_on(place: int, error: Exception) -> int:
        if rank == place:
            raise error
        return rank

    missing = FileNotFoundError(2, os.strerror(2), "gone.json")
    return [
        outcome(lambda: run_on_all_ranks(lambda: rank)),
        outcome(lambda: run_on_all_ranks(lambda: raise_on(1, DataError("no sample")))),
        outcome(lambda: run_on_all_ranks(lambda: raise_on(1, missing))),
        outcome(lambda: run_on_all_ranks(lambda: raise_on(1, missing), words_of)),
        outcome(lambda: run_on_first_rank(lambda: 7 + rank)),
        outcome(lambda: run_on_first_rank(lambda: raise_on(0, missing))),
    ]


def words_of(error: Exception) -> UserError:
    return CheckpointError(type(error).__name__)


def outcome(work: Callable[[], int]) -> Outcome:
    try:
        return work()
    except UserError as error:
        return type(error), str(error)


def test_work_of_one_rank_that_fails_on_all() -> None:
    first, second = run_distributed(do_work, 2)
    assert (first.pop(0), second.pop(0)) == (0, 1)
    assert first == second
    assert first == [
        (DataError, f"{rank_on_this_host(1)}: no sample"),
        (UserError, f"{rank_on_this_host(1)}: No such file or directory: 'gone.json'"),
        (CheckpointError, f"{rank_on_this_host(1)}: FileNotFoundError"),
        7,
        (UserError, f"{rank_on_this_host(0)}: No such file or directory: 'gone.json'"),
    ]


def test_a_process_alone_raises_its_own_error() -> None:
    assert not dist.is_initialized()
    all_ranks_agree(None)
    mistake = ConfigError("no file")
    with pytest.raises(ConfigError, match=r"^no file$") as raised:
        all_ranks_agree(mistake)
    assert raised.value is mistake
    with pytest.raises(ZeroDivisionError):  # a bug
        run_on_all_ranks(lambda: 1 // 0)
    assert run_on_first_rank(lambda: 3) == 3

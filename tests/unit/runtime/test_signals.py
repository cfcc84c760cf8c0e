"""Signals become a request that all ranks see at the same step."""

import os
import signal

import pytest
import torch.distributed as dist

from megatron_dattn.runtime.signals import SignalWatcher
from tests.support.distributed import run_distributed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_a_note(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with SignalWatcher() as watcher:
        assert watcher.received is None
        assert watcher.flag == 0
        os.kill(os.getpid(), number)
        assert watcher.received == number
        assert SignalWatcher.from_flag(watcher.flag) == number
    assert signal.getsignal(number) == before
    assert SignalWatcher.from_flag(0) is None


def test_the_first_signal_is_kept() -> None:
    with SignalWatcher() as watcher:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert watcher.received == signal.SIGUSR1


def test_a_second_interrupt_is_an_interrupt() -> None:
    with SignalWatcher() as watcher:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert watcher.received == signal.SIGINT


def test_without_a_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    with SignalWatcher() as watcher:
        assert watcher.requested_anywhere() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert watcher.requested_anywhere() == signal.SIGTERM


def steps_until_stopped(stop_at: int) -> tuple[int, str]:
    """Only rank 1 is told, in the middle of its step."""
    with SignalWatcher() as watcher:
        for step in range(100):
            if step == stop_at and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            reason = watcher.requested_anywhere()
            if reason is not None:
                return step, reason.name
    return -1, ""


def test_a_signal_to_one_rank_stops_all_at_the_same_step() -> None:
    assert run_distributed(steps_until_stopped, 2, 4) == [(4, "SIGTERM")] * 2

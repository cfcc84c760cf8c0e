"""Signals become a request that all ranks see at the same step."""

import os
import signal
import subprocess
import sys

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


def test_a_process_that_ends_ignores_requests() -> None:
    with SignalWatcher() as watcher:
        watcher.ignore_requests()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert watcher.received is None
        os.kill(os.getpid(), signal.SIGINT)
        assert watcher.received == signal.SIGINT, "for whoever cannot wait"


def test_the_first_signal_is_kept() -> None:
    with SignalWatcher() as watcher:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert watcher.received == signal.SIGUSR1


def test_a_second_interrupt_is_an_interrupt() -> None:
    with SignalWatcher() as watcher, watcher.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert watcher.received == signal.SIGINT
        assert not watcher._interruptible, "a third one does not wait for what cleans up"


@pytest.mark.parametrize("swallowed", [False, True])
def test_while_modules_are_imported_a_second_interrupt_ends_at_once(swallowed: bool) -> None:
    """Whatever an import makes of exceptions; and without the import of torch."""
    code = (
        "import os, signal, sys\n"
        "from megatron_dattn.runtime.signals import SignalWatcher\n"
        "SignalWatcher().__enter__()\n"
        "assert 'torch' not in sys.modules\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('goes on', flush=True)\n"
        "try: os.kill(os.getpid(), signal.SIGINT)\n"
        f"except {'BaseException' if swallowed else 'OSError'}: pass"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "goes on\n", "interrupted\n")


def test_a_launcher_that_is_gone_is_a_request_to_stop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only for a process that has one: others may outlive their shell."""
    by_hand, launched = SignalWatcher(), SignalWatcher()
    launched.watch_launcher()
    assert launched.received is None
    parent = os.getppid()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert by_hand.received is None
    assert launched.received == signal.SIGHUP
    assert launched.flag == int(signal.SIGHUP)
    assert launched.received == signal.SIGHUP
    (message,) = caplog.messages
    assert f"the launcher (process {parent}) is gone" in message


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

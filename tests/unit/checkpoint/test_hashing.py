"""The sum of a file does not depend on whether a thread is to be had for it."""

import _thread
import hashlib
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_dattn.checkpoint import files
from megatron_dattn.checkpoint.files import HashBeside, size_and_sha256
from tests.support.distributed import run_distributed

BLOCKS = [bytes([number]) * 300_000 for number in range(5)] + [b"small", b""]


def sum_of(blocks: list[bytes]) -> str:
    with HashBeside() as digest:
        for block in blocks:
            digest.begin(block)
            digest.finish()
        return digest.hexdigest()


def refuse(*arguments: object) -> None:
    raise RuntimeError("can't start new thread")


def die_at_once(*arguments: object) -> None:
    """What a thread does that meets a MemoryError before its function has begun."""


@pytest.mark.parametrize("start", [_thread.start_new_thread, refuse, die_at_once])
def test_a_thread_that_does_not_run_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, start: Callable[..., object]
) -> None:
    monkeypatch.setattr(files._thread, "start_new_thread", start)
    found: list[object] = []
    path = tmp_path / "file"
    path.write_bytes(b"".join(BLOCKS) * 8)  # several blocks of a read

    def work() -> None:
        found.extend([sum_of(BLOCKS), size_and_sha256(path)])

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(timeout=60)
    whole = b"".join(BLOCKS)
    expected = (8 * len(whole), hashlib.sha256(8 * whole).hexdigest())
    assert found == [hashlib.sha256(whole).hexdigest(), expected]


def test_the_helper_s_failure_is_the_owner_s() -> None:
    with HashBeside() as digest:
        digest.begin(memoryview(bytearray(10**6))[::2])
        with pytest.raises(BufferError):
            digest.finish()


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert size_and_sha256(tmp_path / "file") == (0, hashlib.sha256(b"").hexdigest())


def hash_with_little_memory() -> list[str]:
    """With room for no thread, for a thread's stack alone, and for a little more."""
    sums = []
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    for room in (0, 2**23, 2**23 + 2**16, 2**24):
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
        try:
            sums.append(sum_of(BLOCKS))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return sums


def test_under_a_real_limit_of_memory() -> None:
    """A thread that dies in its first moments was waited for, and the save with it."""
    (sums,) = run_distributed(hash_with_little_memory, 1, timeout=60)
    assert sums == [hashlib.sha256(b"".join(BLOCKS)).hexdigest()] * 4

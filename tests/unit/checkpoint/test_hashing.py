"""The sum of a file does not depend on whether a thread is to be had for it."""

import _thread
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dattn.checkpoint import hashing
from megatron_dattn.checkpoint.files import size_and_sha256
from megatron_dattn.checkpoint.hashing import HashBeside

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
    monkeypatch.setattr(hashing._thread, "start_new_thread", start)
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

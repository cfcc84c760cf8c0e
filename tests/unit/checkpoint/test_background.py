"""A save beside training has the guarantees of one that training waits for."""

import _thread
import json
import os
import random
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_dattn.checkpoint import background, find_checkpoint, load_checkpoint, writer
from megatron_dattn.checkpoint.background import Background
from megatron_dattn.checkpoint.chunk_bytes import HostMemory
from megatron_dattn.checkpoint.commit import LocalWork, run_to_end, save_checkpoint, save_steps
from megatron_dattn.errors import CheckpointError
from tests.support.distributed import RankError, run_distributed
from tests.unit.checkpoint.conftest import FACTS

SIZE = 5000
BLOCK = 1000  # bytes, in place of the writer's


def state_of(weight: torch.Tensor) -> dict[str, Any]:
    shards = {name: ShardedTensor.from_rank_offsets(name, weight) for name in ("body.a", "body.b")}
    return {"model": shards, "schedule": {"num_steps": 3}}


def begin(
    folder: Path, step: int, weight: torch.Tensor, memory: HostMemory | None = None
) -> Background[Path]:
    cancelled = threading.Event()
    steps = save_steps(
        folder,
        step,
        state_of(weight),
        facts=FACTS,
        extra_files={"rng-00000.pt": b"random"},
        memory=memory or HostMemory(),
        cancelled=cancelled,
    )
    return Background(steps, cancelled)


class Gate:
    """Holds the writing thread up between two blocks."""

    def __init__(self) -> None:
        self._open, self.reached = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        self.reached.set()
        assert self._open.wait(60)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    """In front of every block but the first of a file."""
    gate, write_block = Gate(), writer._WatchedStream._write_block

    def write_after_the_gate(stream: Any, block: memoryview) -> None:
        if stream.size and threading.current_thread() is not threading.main_thread():
            gate.pass_through()
        write_block(stream, block)

    with (
        mock.patch.object(writer, "_BLOCK", BLOCK),
        mock.patch.object(writer._WatchedStream, "_write_block", write_after_the_gate),
    ):
        yield gate
        gate.open()


def values_of(folder: Path, step: int) -> torch.Tensor:
    found = find_checkpoint(folder)
    assert found is not None
    assert found.step == step
    loaded = load_checkpoint(found.path, state_of(torch.empty(SIZE)))["model"]
    assert torch.equal(loaded["body.a"], loaded["body.b"])
    return loaded["body.a"]


def test_what_is_saved_is_the_state_of_the_beginning(tmp_path: Path, gate: Gate) -> None:
    weight = torch.randn(SIZE)
    before = weight.clone()
    in_turn = save_checkpoint(
        tmp_path / "sync", 3, state_of(weight), facts=FACTS, extra_files={"rng-00000.pt": b"random"}
    )
    save = begin(tmp_path / "async", 3, weight)
    assert gate.reached.wait(60)
    weight.add_(1)  # the next step's update
    assert not save.advance()
    assert find_checkpoint(tmp_path / "async") is None
    gate.open()
    path = save.finish()
    assert torch.equal(values_of(tmp_path / "async", 3), before)
    files = json.loads((path / "manifest.json").read_text())["files"]
    expected = json.loads((in_turn / "manifest.json").read_text())["files"]
    assert files.keys() == expected.keys()
    for name in files.keys() - {".metadata"}:  # that one holds an id of its own
        assert files[name] == expected[name], name
        assert (path / name).read_bytes() == (in_turn / name).read_bytes(), name


def test_it_goes_on_only_between_two_steps(tmp_path: Path) -> None:
    """What happens together (here: by this one rank) happens in the thread that trains."""
    main, happened = threading.current_thread(), []

    def steps() -> Any:
        for number in range(3):
            happened.append(threading.current_thread() is main)
            done = threading.Event()
            result = yield LocalWork("testing", lambda n=number, d=done: (d.set(), n))
            assert done.is_set()
            assert result[1] == number
        return "the end"

    save = Background(steps(), threading.Event())
    while not save.advance():
        pass
    assert save._results == ["the end"]
    assert happened == [True] * 3
    assert run_to_end(steps()) == "the end"


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("place", ["write_share", "write_index"])
def test_a_failure_of_the_writer_is_an_error_between_steps(tmp_path: Path, place: str) -> None:
    save_checkpoint(tmp_path, 1, state_of(torch.ones(SIZE)), facts=FACTS)
    full = OSError(28, os.strerror(28), str(tmp_path / "step-0000002" / "__0_0.distcp"))
    with mock.patch.object(writer, place, fail_with(full)):
        save = begin(tmp_path, 2, torch.zeros(SIZE))
        with pytest.raises(CheckpointError) as error:
            save.finish()
    text = str(error.value)
    assert text.startswith(f"disk full: {tmp_path}/step-0000002 needs 0.000 GiB, {tmp_path} has")
    assert "__0_0.distcp" in text
    assert text.endswith("the previous checkpoint stays the latest")
    assert torch.equal(values_of(tmp_path, 1), torch.ones(SIZE))
    assert sorted(os.listdir(tmp_path)) == ["latest.json", "step-0000001"]
    begin(tmp_path, 2, torch.zeros(SIZE)).finish()
    assert torch.equal(values_of(tmp_path, 2), torch.zeros(SIZE))


def test_a_real_write_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save_checkpoint(tmp_path, 1, state_of(torch.ones(SIZE)), facts=FACTS)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, hard))
    try:
        save = begin(tmp_path, 2, torch.zeros(SIZE))
        with pytest.raises(CheckpointError) as error:
            save.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"File too large: '{tmp_path}/step-0000002/__0_0.distcp'" in str(error.value)
    assert "raise ulimit -f" in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["latest.json", "step-0000001"]


def test_a_bug_of_the_thread_is_told(tmp_path: Path) -> None:
    with mock.patch.object(writer, "write_share", fail_with(TypeError("a bug"))):
        save = begin(tmp_path, 1, torch.zeros(SIZE))
        with pytest.raises(CheckpointError, match="TypeError: a bug"):
            save.finish()


def refuse(*arguments: object) -> None:
    raise RuntimeError("can't start new thread")


def die_at_once(*arguments: object) -> None:
    """What a thread does that meets a MemoryError before its function has begun."""


@pytest.mark.parametrize("start", [refuse, die_at_once])
def test_without_a_thread_the_one_who_waits_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, start: Callable[..., object]
) -> None:
    monkeypatch.setattr(background._thread, "start_new_thread", start)
    save = begin(tmp_path, 1, torch.ones(SIZE))
    assert not save.advance()
    save.finish()
    assert torch.equal(values_of(tmp_path, 1), torch.ones(SIZE))


def test_what_is_given_up_is_no_checkpoint(tmp_path: Path, gate: Gate) -> None:
    save_checkpoint(tmp_path, 1, state_of(torch.ones(SIZE)), facts=FACTS)
    save = begin(tmp_path, 2, torch.zeros(SIZE))
    assert gate.reached.wait(60)
    save.abandon(0.01)  # a disk that hangs
    assert save._helper.is_running
    gate.open()
    save.abandon(60)
    assert not save._helper.is_running
    assert torch.equal(values_of(tmp_path, 1), torch.ones(SIZE))
    begin(tmp_path, 3, torch.zeros(SIZE)).finish()
    assert sorted(os.listdir(tmp_path)) == ["latest.json", "step-0000001", "step-0000003"]


def test_what_is_given_up_before_it_begins_never_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    late: list[Callable[[], None]] = []
    monkeypatch.setattr(background._thread, "start_new_thread", lambda f, args: late.append(f))
    begin(tmp_path, 1, torch.ones(SIZE)).abandon(60)
    late[0]()
    (left,) = tmp_path.iterdir()
    assert list(left.iterdir()) == []


def test_the_copies_are_made_in_the_same_memory(tmp_path: Path) -> None:
    memory = HostMemory()
    for step, value in enumerate((1.0, 2.0), start=1):
        begin(tmp_path, step, torch.full((SIZE,), value), memory).finish()
        assert torch.equal(values_of(tmp_path, step), torch.full((SIZE,), value))
        assert memory.num_bytes == 2 * -(-4 * SIZE // 64) * 64
    held = memory._bytes
    begin(tmp_path, 3, torch.ones(SIZE // 2), memory).finish()
    assert memory._bytes is held


def be_killed(folder: str, seed: int) -> None:
    """A real SIGKILL, by the writing thread in front of some block, while the main one computes."""
    from tests.support.megatron import init_model_parallel

    init_model_parallel()
    save_checkpoint(folder, 1, state_of(torch.ones(SIZE)), facts=FACTS)
    left = random.Random(seed).randrange(2 * 4 * SIZE // BLOCK)
    write_block = writer._WatchedStream._write_block

    def write_or_die(stream: Any, block: memoryview) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        write_block(stream, block)

    with (
        mock.patch.object(writer, "_BLOCK", BLOCK),
        mock.patch.object(writer._WatchedStream, "_write_block", write_or_die),
    ):
        weight = torch.zeros(SIZE)
        save = begin(Path(folder), 2, weight)
        while not save.advance():
            weight.add_(1)


@pytest.mark.parametrize("seed", range(4))
def test_a_kill_at_any_moment_leaves_the_older_one(tmp_path: Path, seed: int) -> None:
    with pytest.raises(RankError, match="exit code -9"):
        run_distributed(be_killed, 1, str(tmp_path), seed)
    assert torch.equal(values_of(tmp_path, 1), torch.ones(SIZE))
    begin(tmp_path, 3, torch.zeros(SIZE)).finish()
    assert sorted(os.listdir(tmp_path)) == ["latest.json", "step-0000001", "step-0000003"]


def test_no_helper_hashes_beside_training(tmp_path: Path) -> None:
    """The sums are this thread's work: a further one would take a processor from training."""
    started: list[str] = []
    start = _thread.start_new_thread

    def note(function: Callable[..., object], arguments: tuple) -> int:
        started.append(function.__qualname__)
        return start(function, arguments)

    with mock.patch.object(_thread, "start_new_thread", note):
        begin(tmp_path, 1, torch.zeros(10**6)).finish()
    assert set(started) == {"_Helper._run"}

"""What nobody foresaw is written down, told to torchrun, and goes on as it is."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.training import CheckpointConfig
from megatron_dattn.runtime import open_files
from megatron_dattn.runtime.launcher import Launch
from megatron_dattn.runtime.lost_ranks import LostRankError
from megatron_dattn.runtime.signals import SignalWatcher
from megatron_dattn.training import pretrain, run_folder
from megatron_dattn.training.exit_reason import ExitReason
from megatron_dattn.training.pretrain import run_to_its_end, write_ending
from megatron_dattn.training.run_lock import RunLock


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(checkpoint=CheckpointConfig(save=str(tmp_path / "run")))


def note_in(config: PretrainConfig) -> dict | None:
    assert config.checkpoint.save is not None
    path = Path(config.checkpoint.save) / "exit_reason.json"
    return json.loads(path.read_text()) if path.exists() else None


@pytest.mark.parametrize("rank", [0, 1])
def test_a_crash(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """On whatever rank: the first one may be the one that was lost."""

    def lost(*_: object) -> ExitReason:
        raise RuntimeError("Connection closed by peer\nframe #0")

    monkeypatch.setattr(pretrain, "_run", lost)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(RuntimeError, match="Connection closed"):
        run_to_its_end(config, Launch("torchrun", rank, 2, rank), SignalWatcher())
    note = note_in(config)
    assert note is not None
    assert (note["reason"], note["exit_code"]) == ("crash", 1)
    assert note["detail"] == "RuntimeError: Connection closed by peer"
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert "Traceback" in told["extraInfo"]["py_callstack"]
    assert told["errorCode"] == 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "raise ulimit -n"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_a_foreseeable_failure_of_one_rank_is_one_line(
    config: PretrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rank: int,
    error: Exception,
    words: str,
) -> None:
    """Of that rank: the others are in the middle of a step and cannot be told."""

    def fail(*_: object) -> ExitReason:
        raise error

    monkeypatch.setattr(pretrain, "_run", fail)
    ending = run_to_its_end(config, Launch("torchrun", rank, 2, rank), SignalWatcher())
    assert (ending.reason, ending.exit_code, ending.is_shared) == ("user_error", 2, False)
    assert words in ending.detail
    assert "\n" not in ending.detail
    assert [ending.detail] * rank == caplog.messages
    note = note_in(config)
    assert note == {
        "reason": "user_error",
        "step": None,
        "detail": ending.detail,
        "exit_code": 2,
    }


def test_a_second_interrupt_is_an_ending(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> ExitReason:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "_run", interrupted)
    ending = run_to_its_end(config, Launch(), SignalWatcher())
    assert (ending.reason, ending.exit_code) == ("interrupted", 130)
    assert "second SIGINT" in ending.detail
    note = note_in(config)
    assert note is not None
    assert note["reason"] == "interrupted"


def test_a_signal_before_the_start_is_an_orderly_end(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One process need not even be connected; a folder of somebody else's is left alone."""
    monkeypatch.setattr(pretrain, "join_ranks", lambda config: pytest.fail("it was started"))
    with SignalWatcher() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        ending = run_to_its_end(config, Launch(), signals)
        assert ending == ExitReason("signal", None, "SIGTERM")
        note = note_in(config)
        assert note is not None
        assert (note["reason"], note["step"], note["exit_code"]) == ("signal", None, 0)
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        (foreign / "model.safetensors").write_bytes(b"weights")
        other = PretrainConfig(checkpoint=CheckpointConfig(save=str(foreign)))
        assert run_to_its_end(other, Launch(), signals).reason == "signal"
        assert [path.name for path in foreign.iterdir()] == ["model.safetensors"]


def test_too_few_open_files_are_refused_before_the_start(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "join_ranks", lambda config: pytest.fail("it was started"))
    monkeypatch.setattr(open_files.resource, "getrlimit", lambda kind: (20, 64))
    ending = run_to_its_end(config, Launch(), SignalWatcher())
    assert (ending.reason, ending.exit_code) == ("user_error", 2)
    assert "ulimit -n" in ending.detail


def test_a_lost_rank(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 1 says it for itself: rank 0 may be the one that is lost."""

    def lost(*_: object) -> ExitReason:
        raise LostRankError("rank 0 does not answer")

    monkeypatch.setattr(pretrain, "_run", lost)
    ending = run_to_its_end(config, Launch("torchrun", 1, 2, 1), SignalWatcher())
    assert ending == ExitReason("lost_rank", detail="rank 0 does not answer", is_shared=False)
    assert caplog.messages == ["rank 0 does not answer"]
    note = note_in(config)
    assert note is not None
    assert (note["reason"], note["exit_code"]) == ("lost_rank", 19)


def test_a_frozen_rank_0_still_holds_the_lock(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own run writes there all the same; another run does not."""
    assert config.checkpoint.save is not None
    lock = RunLock.acquire(config.checkpoint.save)
    try:
        ending = ExitReason("lost_rank", detail="rank 0 does not answer")
        write_ending(config, Launch("torchrun", 1, 2, 1), ending)
        assert note_in(config) is None
        monkeypatch.setattr(run_folder, "on_first_rank", lambda purpose, work: None)  # of rank 1
        with pytest.raises(LostRankError), run_folder.own_run_folder(config.checkpoint.save):
            raise LostRankError("rank 0 does not answer")
        note = note_in(config)
    finally:
        lock.release()
    assert note is not None
    assert note["reason"] == "lost_rank"


def test_the_first_word_stays(config: PretrainConfig) -> None:
    others = Launch("torchrun", 1, 2, 1)
    write_ending(config, others, ExitReason("user_error", detail="all ranks know"))
    assert note_in(config) is None
    write_ending(config, Launch(), ExitReason("signal", 3))
    write_ending(config, others, ExitReason("crash", detail="while leaving"))
    assert note_in(config)["reason"] == "signal"


def test_doubt_about_the_launcher_ends_a_start(config: PretrainConfig) -> None:
    ending = run_to_its_end(config, Launch(doubt="WORLD_SIZE is 8"), SignalWatcher())
    assert ending == ExitReason("user_error", detail="WORLD_SIZE is 8")

"""What nobody foresaw is written down, told to torchrun, and goes on as it is."""

import json
from pathlib import Path

import pytest

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.runtime.launcher import Launch
from megatron_dattn.runtime.signals import SignalWatcher
from megatron_dattn.training import endings
from megatron_dattn.training.config import CheckpointConfig
from megatron_dattn.training.endings import leave_word, run_to_its_end
from megatron_dattn.training.exits import ExitReason


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

    monkeypatch.setattr(endings, "_run", lost)
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


def test_the_first_word_stays(config: PretrainConfig) -> None:
    others = Launch("torchrun", 1, 2, 1)
    leave_word(config, others, ExitReason("user_error", detail="all ranks know"))
    assert note_in(config) is None
    leave_word(config, Launch(), ExitReason("signal", 3))
    leave_word(config, others, ExitReason("crash", detail="while leaving"))
    assert note_in(config)["reason"] == "signal"


def test_doubt_about_the_launcher_ends_a_start(config: PretrainConfig) -> None:
    ending = run_to_its_end(config, Launch(doubt="WORLD_SIZE is 8"), SignalWatcher())
    assert ending == ExitReason("user_error", detail="WORLD_SIZE is 8")

"""How a run's ending is written down."""

import json
from pathlib import Path

from megatron_dattn.training.exits import ExitReason, clear_exit_reason, record_exit


def test_exit_codes() -> None:
    assert ExitReason("finished", 3).exit_code == 0
    assert ExitReason("signal", 3).exit_code == 0
    assert ExitReason("user_error").exit_code == 2
    assert ExitReason("numerics", 3).exit_code == 17


def test_the_file_holds_everything_and_can_be_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    record_exit(folder, ExitReason("signal", 7, "SIGTERM"))
    (path,) = folder.iterdir()
    assert path.name == "exit_reason.json"
    assert json.loads(path.read_text()) == {
        "reason": "signal",
        "step": 7,
        "detail": "SIGTERM",
        "exit_code": 0,
    }
    clear_exit_reason(folder)
    assert not list(folder.iterdir())
    clear_exit_reason(folder)


def test_a_folder_that_cannot_be_made_is_only_warned_about(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    record_exit(tmp_path / "file" / "run", ExitReason("finished", 1))
    assert "cannot be written" in caplog.text
    record_exit(None, ExitReason("finished", 1))

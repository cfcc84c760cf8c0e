"""How a run's ending is written down."""

import json
from pathlib import Path

import pytest

from megatron_dattn.errors import DataError, OutageError
from megatron_dattn.runtime.lost_ranks import LostRankError
from megatron_dattn.runtime.rendezvous import RendezvousError
from megatron_dattn.training.exit_reason import (
    ExitReason,
    NumericsError,
    clear_exit_reason,
    ending_of,
    record_exit,
)


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (DataError("no file"), ExitReason("user_error", detail="no file")),
        (OutageError("no disk"), ExitReason("crash", detail="no disk")),
        (RendezvousError("no host"), ExitReason("rendezvous", detail="no host", is_shared=False)),
        (
            LostRankError("no rank 1"),
            ExitReason("lost_rank", detail="no rank 1", is_shared=False),
        ),
        (NumericsError("NaN", 7), ExitReason("numerics", 7, "NaN")),
        (
            RuntimeError("connection closed\nframe #0"),
            ExitReason("crash", detail="RuntimeError: connection closed"),
        ),
        (ValueError(), ExitReason("crash", detail="ValueError: ")),
    ],
)
def test_every_error_is_an_ending(error: Exception, ending: ExitReason) -> None:
    assert ending_of(error) == ending


def test_exit_codes() -> None:
    assert ExitReason("finished", 3).exit_code == 0
    assert ExitReason("signal", 3).exit_code == 0
    assert ExitReason("user_error").exit_code == 2
    assert ExitReason("numerics", 3).exit_code == 17
    assert ExitReason("rendezvous").exit_code == 18
    assert ExitReason("interrupted").exit_code == 130
    assert ExitReason("lost_rank").exit_code == 19
    assert ExitReason("crash").exit_code == 1


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

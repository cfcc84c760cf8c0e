"""How a rank says why it ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_dattn.runtime.error_report import report_error, write_error_file
from megatron_dattn.runtime.launcher import Launch


def test_rank_0_speaks_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_error(Launch("torchrun", 1, 2, 1), "no file", 2) == 2
    assert capsys.readouterr().err == ""
    assert report_error(Launch(), "no file", 2) == 2
    assert capsys.readouterr().err == "error: no file\n"


@pytest.mark.parametrize("gives_up", [True, False])
def test_a_full_disk_does_not_change_the_exit_code(gives_up: bool) -> None:
    """Python itself ends with 120 where it cannot write what waits."""
    code = (
        "import sys\n"
        "from megatron_dattn.runtime.log import give_up_unwritable_output\n"
        "print('to a full disk')\n"
        f"{'give_up_unwritable_output()' * gives_up}\n"
        "sys.exit(7)"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": ""},
            timeout=60,
            check=False,
        )
    assert done.returncode == (7 if gives_up else 120)
    assert done.stderr == "" or not gives_up


def failure(folder: Path, local_rank: int) -> ProcessFailure:
    return ProcessFailure(local_rank, 1000 + local_rank, 2, str(folder / f"{local_rank}.json"))


@pytest.mark.parametrize("shared", [True, False])
def test_torchrun_reports_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    for rank in (1, 0):  # the second one is late: the first rank is the root cause all the same
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"{rank}.json"))
        write_error_file(Launch("torchrun", rank, 2, rank), "error: no file", 2, shared=shared)
    report = str(ChildFailedError("main", {rank: failure(tmp_path, rank) for rank in (0, 1)}))
    root_cause = report.split("Root Cause")[1]
    assert "traceback : error: no file" in root_cause
    assert report.count("error: no file") == (1 if shared else 2)


def test_no_file_without_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    write_error_file(Launch(), "error", 2, shared=False)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no" / "folder.json"))
    write_error_file(Launch(), "error", 2, shared=False)  # not worth another error

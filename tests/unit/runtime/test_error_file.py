"""What torchrun makes of the file that a process leaves for it."""

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_dattn.runtime.error_file import write_error_file
from megatron_dattn.runtime.launcher import Launch


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

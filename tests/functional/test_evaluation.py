"""An evaluation that is killed in the middle of a line goes on, and ends with the same table."""

import os
import signal
from pathlib import Path

import pytest

from megatron_dattn.runtime.append_file import AppendFile
from tests.support.distributed import fork_server_process
from tests.unit.evaluation.conftest import save_run_and_questions
from tools.evaluate import main

BATCHES, KILLED_IN = 3, 2


def killed(flags: list[str]) -> None:
    """The tool, which dies by SIGKILL when it has written half of a batch's answers."""
    batches = []
    append = AppendFile.append

    def half(file: AppendFile, record: bytes) -> None:
        batches.append(record)
        if len(batches) < KILLED_IN:
            append(file, record)
        else:
            append(file, record[: len(record) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    AppendFile.append = half  # type: ignore[method-assign]
    main(flags)


def test_a_killed_evaluation_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = save_run_and_questions(tmp_path, "run")
    flags = ["--checkpoint", str(tmp_path / "run"), "--data", str(questions)]
    flags += ["--metric", "anls", "--max-new-tokens", "5", "--batch-size", "4", "--output"]
    assert main([*flags, str(tmp_path / "whole")]) == 0
    table = capsys.readouterr().out

    process = fork_server_process(killed, [*flags, str(tmp_path / "killed")])
    process.join()
    assert process.exitcode == -signal.SIGKILL
    file = tmp_path / "killed" / "answers.jsonl"
    left = file.read_bytes()
    assert 4 <= left.count(b"\n") < 8
    assert not (tmp_path / "killed" / "scores.json").exists()

    assert main([*flags, str(tmp_path / "killed")]) == 0
    assert capsys.readouterr().out == table
    for name in ("answers.jsonl", "scores.json", "evaluation.json"):
        whole, resumed = (tmp_path / folder / name for folder in ("whole", "killed"))
        assert whole.read_bytes() == resumed.read_bytes(), name

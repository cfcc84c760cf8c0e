"""The command line of the generator: what is wrong is one line and exit status 2."""

from pathlib import Path

import pytest

from megatron_dattn import inference
from tools.generate import main


@pytest.mark.parametrize("count", ["0", "-3"])
def test_an_answer_has_at_least_one_token(tmp_path: Path, count: str, capsys) -> None:
    assert main(["--checkpoint", str(tmp_path), f"--max-new-tokens={count}"]) == 2
    assert f"--max-new-tokens must be at least 1, got {count}" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_one_error(tmp_path: Path, monkeypatch, capsys) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "config.yaml"))

    monkeypatch.setattr(inference, "load_model", refuse)
    assert main(["--checkpoint", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"error: Permission denied: '{tmp_path / 'config.yaml'}'\n"
    assert error.count("\n") == 1

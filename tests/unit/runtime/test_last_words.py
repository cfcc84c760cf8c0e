"""How a rank says why it ends."""

import os
import subprocess
import sys

import pytest

from megatron_dattn.runtime.last_words import report_error
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
        "from megatron_dattn.runtime.last_words import give_up_unwritable_output\n"
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

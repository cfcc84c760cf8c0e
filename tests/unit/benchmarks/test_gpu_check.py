"""The check of a GPU: its parts fit the time, one that fails or hangs costs no other."""

import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Part, check, parts


def test_the_parts_fit_the_time() -> None:
    whole = parts(small=False)
    assert sum(part.seconds for part in whole) <= 60 * gpu_check.MINUTES
    assert all(part.expected < part.seconds for part in whole)
    assert [part.name for part in whole][:2] == ["training", "kernels"]
    small = {part.name for part in parts(small=True)}
    assert small - {part.name for part in whole} == {"layer_12"}


def test_a_part_that_fails_or_hangs_costs_no_other(tmp_path: Path) -> None:
    sleeps = "import time; time.sleep(60)"
    hangs = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{sleeps}'])"
    todo = [
        Part("fails", "", ["-c", "print('why | not'); raise SystemExit(3)"], 5, 60),
        Part("hangs", "", ["-c", hangs], 5, 1),
        Part("writes", "", ["-c", "import sys; open(sys.argv[2], 'w').write('# T')"], 5, 60, True),
    ]
    assert not check(todo, tmp_path, 5.0, "typed")
    rows = [line for line in (tmp_path / "gpu_check.md").read_text().split("\n") if line[:1] == "|"]
    assert "failed with exit code 3" in rows[2]
    assert rows[2].endswith("| 5 | why / not |")
    assert "stopped after 1 s" in rows[3]
    assert "passed" in rows[4]
    assert (tmp_path / "writes.md").read_text() == "# T"


def test_when_the_time_is_up_nothing_more_begins(tmp_path: Path) -> None:
    started = time.monotonic()
    waits = Part("waits", "", ["-c", "import time; time.sleep(60)"], 5, 60)
    todo = [waits, Part("late", "", [], 5, 60)]
    assert not check(todo, tmp_path, 1 / 60, "typed")
    assert time.monotonic() - started < 30
    assert "not run: the time is up" in (tmp_path / "gpu_check.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_so(capsys) -> None:
    assert gpu_check.main([]) == 2
    assert "no CUDA device; --small" in capsys.readouterr().err
    assert gpu_check.main(["--small", "--parts", "step"]) == 2
    assert "no parts step; choose of training, kernels" in capsys.readouterr().err


@pytest.mark.slow
def test_all_parts_run_at_small_size(tmp_path: Path) -> None:
    assert gpu_check.main(["--small", "--output", str(tmp_path)]) == 0
    for name in ("step_dattn", "step_s_attn", "layer_12", "generation"):
        assert "- versions: Python" in (tmp_path / f"{name}.md").read_text()

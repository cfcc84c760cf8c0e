"""One training step and one import run through few enough files to be read in an afternoon.

In processes of their own, as what a process has done before (a cache, an import) is not traced.
docs/reading_tour.md has both lists and names these numbers.
"""

import re
import subprocess
import sys
from pathlib import Path

from tests.functional.workspace import ROOT, environment, make_workspace
from tests.unit.conversion.hf_models import (
    SPECIAL_TOKENS,
    save_language,
    save_tokenizer,
    save_vision,
)

MOST_IN_A_STEP, MOST_IN_AN_IMPORT = 45, 35
TOUR = (ROOT / "docs" / "reading_tour.md").read_text(encoding="utf-8")


def traced(*command: str | Path) -> list[str]:
    """The files that a command runs through, by `tools/trace_code.py`."""
    done = subprocess.run(
        [sys.executable, "tools/trace_code.py", *map(str, command)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [line.split()[1] for line in done.stdout.splitlines() if line.endswith(".py")]


def not_in_the_tour(files: list[str], heading: str) -> list[str]:
    """Those of the files that the tour's section does not name."""
    section = TOUR.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    names = (file.removeprefix("megatron_dattn/") for file in files)
    return [name for name in names if not re.search(rf"`{re.escape(name)}[:`]", section)]


def test_one_training_step(tmp_path: Path) -> None:
    config = make_workspace(tmp_path).config
    command = ("--within", "train_step", "pretrain_vlm.py", "--config", config)
    flags = ("--train-iters", "2", "--num-workers", "1", "--save", tmp_path / "run")
    files = traced(*command, *flags)
    assert 30 < len(files) <= MOST_IN_A_STEP, "\n".join(files)
    assert not not_in_the_tour(files, "One training step")
    assert f"{MOST_IN_A_STEP} files for a training step" in TOUR


def test_one_import(tmp_path: Path) -> None:
    vision, language = tmp_path / "vision", tmp_path / "language"
    save_vision(vision)
    save_language(language)
    save_tokenizer(language, SPECIAL_TOKENS)
    command = ("tools/convert_checkpoint.py", "import", "--vision", vision)
    files = traced(*command, "--language", language, "--output", tmp_path / "run")
    assert 25 < len(files) <= MOST_IN_AN_IMPORT, "\n".join(files)
    assert not not_in_the_tour(files, "One import")
    assert f"{MOST_IN_AN_IMPORT} for an import" in TOUR

"""A Transformer Engine that is not whole counts as none, also to megatron-core."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dattn.runtime import transformer_engine
from megatron_dattn.runtime.transformer_engine import te_failure

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
from megatron_dattn.runtime.log import silence_import_warnings
silence_import_warnings()
from megatron.core import fp8_utils
from megatron_dattn.models.layer_specs import resolve_implementation
from megatron_dattn.runtime.transformer_engine import te_failure
print(resolve_implementation("auto", "none"), fp8_utils.HAVE_TE, te_failure())
"""


def test_a_core_without_its_part_for_torch_is_hidden(tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text('__version__ = "2.19.0"\n')
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    words = "local False its part for torch does not load (ModuleNotFoundError: No module named"
    assert run.stdout.splitlines()[-1].startswith(words)


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_engine, "find_spec", lambda name: None)
    te_failure.cache_clear()
    try:
        assert te_failure() == "it is not installed"
    finally:
        te_failure.cache_clear()

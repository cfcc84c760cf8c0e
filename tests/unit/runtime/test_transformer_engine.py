"""A Transformer Engine that is not whole, or too old, counts as none, also to megatron-core."""

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_dattn.runtime import engine_imports
from megatron_dattn.runtime.engine_imports import fp8_failure, te_failure

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
from megatron_dattn.runtime.log import silence_import_warnings
silence_import_warnings()
from megatron.core import fp8_utils
from megatron_dattn.models.layer_specs import resolve_implementation
from megatron_dattn.runtime.engine_imports import te_failure
from megatron_dattn.models.execution import ExecutionConfig
print(resolve_implementation(ExecutionConfig()), fp8_utils.HAVE_TE, te_failure())
"""


def found(folder: Path, version: str, *, part_for_torch: bool) -> str:
    """What the program says where such a Transformer Engine is installed."""
    package = folder / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text(f'__version__ = "{version}"\n')
    if part_for_torch:
        (package / "pytorch.py").touch()
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


def test_a_core_without_its_part_for_torch_is_hidden(tmp_path: Path) -> None:
    words = "local False its part for torch does not load (ModuleNotFoundError: No module named"
    assert found(tmp_path, "2.19.0", part_for_torch=False).startswith(words)


def test_an_old_one_is_hidden(tmp_path: Path) -> None:
    said = found(tmp_path, "2.5.0+abc", part_for_torch=True)
    assert said == "local False version 2.5.0+abc is older than 2.6"


def test_fp8_asks_for_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.fp8")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    fp8: Any = sys.modules[names[-1]]
    fp8.check_fp8_support = lambda: (True, "")
    fp8.check_fp8_block_scaling_support = lambda: (False, "it requires Hopper")
    assert fp8_failure("tensorwise") is fp8_failure("delayed") is None
    assert fp8_failure("blockwise") == "it requires Hopper"


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_imports, "find_spec", lambda name: None)
    te_failure.cache_clear()
    try:
        assert te_failure() == "it is not installed"
    finally:
        te_failure.cache_clear()

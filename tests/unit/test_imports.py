"""The rules that a reader relies on: imports run one way, and nothing is long."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_dattn"
SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))

# What each package may import of ours, besides itself.
LEAVES = {"errors", "runtime", "yaml_files"}
BELOW_TRAINING = LEAVES | {
    *("attention", "batch", "parallel", "data", "models", "planner", "config", "checkpoint"),
}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "runtime": {"errors"},
    "yaml_files": {"errors"},
    "attention": {"errors"},
    "batch": {"attention"},
    "checkpoint": LEAVES,
    "data": LEAVES | {"attention", "batch"},
    "parallel": LEAVES | {"attention", "batch"},
    "models": LEAVES | {"attention", "batch", "parallel"},
    "planner": LEAVES | {"attention", "parallel", "models"},
    "config": LEAVES | {"attention", "parallel", "data", "models"},
    # An export starts where generation does: at a run folder's checkpoint.
    "conversion": BELOW_TRAINING | {"inference", "hf"},
    "hf": set(),  # travels with exported weights, where nothing of ours is installed
    "inference": BELOW_TRAINING,
    "evaluation": BELOW_TRAINING | {"inference"},
    "training": BELOW_TRAINING | {"evaluation"},
}
# Subpackages: what each may import of the others. Files beside them are free.
INNER: dict[str, dict[str, set[str]]] = {
    "attention": {"plan": set(), "backends": {"plan"}},
    "conversion": {
        "io": set(),
        "families": {"io"},
        "hf_import": {"io", "families"},
        "hf_export": {"io", "families"},
        "verify": {"io", "families", "hf_import"},
    },
}
MAX_FILE_LINES = 600
MAX_ENTRY_LINES = 80
MAX_LOOP_LINES = 60


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path) -> set[str]:
    """Full names of our modules that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level and path.parent.name == "hf":
                continue  # siblings: what travels together has no package
            assert node.level == 0, f"{path}: relative imports hide the direction"
            assert node.module is not None
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in names if name.split(".")[0] == PACKAGE}


def _violations(path: Path) -> list[str]:
    package = _module_name(path).split(".")[1:2]
    if not package:  # the package itself: only its version
        return []
    found = []
    for name in sorted(_imported(path)):
        inner = name.removeprefix(f"{PACKAGE}.")
        target = inner.split(".")[0]
        if target != package[0] and target not in ALLOWED[package[0]]:
            found.append(f"{_module_name(path)} imports {name}")
    return found


def test_every_package_is_known() -> None:
    packages = {path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py") for path in SOURCES}
    assert packages - {"__init__"} <= set(ALLOWED)


def test_the_table_of_packages_runs_one_way() -> None:
    graphlib.TopologicalSorter(ALLOWED).prepare()  # raises CycleError


def test_imports_run_one_way() -> None:
    violations = [line for path in SOURCES for line in _violations(path)]
    assert not violations, "\n".join(violations)


def _inner_violations(path: Path, package: str) -> list[str]:
    here = path.parent.name
    closed = set(INNER[package]) - INNER[package][here] - {here}
    return [
        f"{_module_name(path)} imports {name}"
        for name in sorted(_imported(path))
        if name.startswith(f"{PACKAGE}.{package}.") and name.split(".")[2] in closed
    ]


@pytest.mark.parametrize("package", INNER)
def test_imports_between_subpackages_run_one_way(package: str) -> None:
    files = [path for path in SOURCES if path.is_relative_to(ROOT / PACKAGE / package)]
    folders = {path.parent.name for path in files} - {package}
    assert folders <= set(INNER[package])
    inner = [path for path in files if path.parent.name != package]
    violations = [line for path in inner for line in _inner_violations(path, package)]
    assert not violations, "\n".join(violations)


def test_a_wrong_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the rule above is able to fail."""
    wrong = ROOT / PACKAGE / "attention" / "wrong.py"
    source = f"def late():\n    from {PACKAGE}.training.step import train_step\n"
    original = Path.read_text

    def read(path: Path, *args: str, **options: str) -> str:
        return source if path == wrong else original(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", read)
    assert _violations(wrong) == [
        f"{PACKAGE}.attention.wrong imports {PACKAGE}.training.step.train_step"
    ]


def test_attention_is_pure_tensor_math() -> None:
    for path in (ROOT / PACKAGE / "attention").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "torch.distributed" not in source, path
        assert "import megatron.core" not in source, path
        assert "from megatron.core" not in source, path


def _is_ours(path: Path) -> bool:
    return not any(part.startswith((".", "build")) for part in path.relative_to(ROOT).parts)


@pytest.mark.parametrize("folder", [PACKAGE, "tests", "tools", "examples", "benchmarks"])
def test_no_file_is_long(folder: str) -> None:
    long_files = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / folder).rglob("*.py")
        if _is_ours(path)
        and (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES
    }
    assert not long_files


def test_entry_script_is_short() -> None:
    lines = (ROOT / "pretrain_vlm.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < MAX_ENTRY_LINES


def test_training_loop_fits_on_a_screen() -> None:
    tree = ast.parse((ROOT / PACKAGE / "training" / "trainer.py").read_text(encoding="utf-8"))
    (loop,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train"]
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno + 1 < MAX_LOOP_LINES


def test_no_class_name_has_two_meanings() -> None:
    """But for hf/, whose classes are the exported twins of ours."""
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        if path.parent.name != "hf":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(_module_name(path))
    assert not {name: found for name, found in places.items() if len(found) > 1}

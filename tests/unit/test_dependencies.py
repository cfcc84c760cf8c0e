"""What was tested is what is allowed: pyproject.toml's ranges end where the locks do."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def _locked(name: str) -> dict[str, Version]:
    text = (ROOT / name).read_text()
    pins = re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)$", text, re.MULTILINE)
    return {canonicalize_name(package): Version(version) for package, version in pins}


LOCKED = _locked("requirements.lock")
NEWEST = _locked("requirements-newest.lock")
# Newer releases than the lock's with which the tests have run too.
TESTED_BESIDES = {
    "torch": Version("2.14.1"),
    "transformers": Version("5.24.0"),
    "megatron-core": NEWEST["megatron-core"],
}
# Come with a declared package that itself fixes which of their releases it takes.
BROUGHT_ALONG = {
    "braceexpand": "megatron-energon",
    "packaging": "transformers",
    "tokenizers": "transformers",
    "webdataset": "megatron-energon",
}
NAMES = {"PIL": "pillow", "google": "protobuf", "yaml": "pyyaml", "sklearn": "scikit-learn"}


def requirements(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return [Requirement(line) for line in lines]


def installed_here() -> list[Requirement]:
    """Everything but what needs a GPU."""
    return requirements(*(extra for extra in EXTRAS if extra != "gpu"))


@pytest.mark.parametrize("requirement", requirements(*EXTRAS), ids=str)
def test_every_range_has_two_ends(requirement: Requirement) -> None:
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators == {"=="} or (operators & {"<", "<="} and ">=" in operators)


@pytest.mark.parametrize("requirement", installed_here(), ids=str)
def test_the_locked_version_is_admitted_and_nothing_behind_the_tested_ones(
    requirement: Requirement,
) -> None:
    name = canonicalize_name(requirement.name)
    locked = LOCKED[name]
    newest = max(locked, TESTED_BESIDES.get(name, locked))
    assert locked in requirement.specifier
    assert newest in requirement.specifier
    for untested in (f"{newest.major}.{newest.minor + 1}", f"{newest.major + 1}.0"):
        assert Version(untested) not in requirement.specifier


def test_the_locks_differ_in_the_engine_alone() -> None:
    """A failure of `make test-newest` alone is then one of megatron-core's version, or of Python's.

    setuptools, which torch needs, is no part of a new environment since Python 3.12.
    """
    assert dict(NEWEST.items() - LOCKED.items()).keys() == {"megatron-core", "setuptools"}
    assert LOCKED.keys() <= NEWEST.keys()


def test_engines_that_were_not_tested_are_not_admitted() -> None:
    (engine,) = (each for each in requirements() if each.name == "megatron-core")
    for version in ("0.16.0", "0.17.1", "0.18.2"):
        assert Version(version) not in engine.specifier


def test_python_has_two_ends_and_this_one_lies_between() -> None:
    admitted = SpecifierSet(PROJECT["requires-python"])
    assert {specifier.operator for specifier in admitted} == {">=", "<"}
    assert Version(".".join(map(str, sys.version_info[:3]))) in admitted


def test_whatever_is_imported_is_declared() -> None:
    declared = {
        canonicalize_name(requirement.name)
        for requirement in requirements("demo", "parquet", "video", "gguf")
    }
    folders = ("megatron_dattn", "tools", "examples")
    unknown = {
        name
        for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
        for module in _imported(path)
        if (name := _distribution(module)) not in declared | BROUGHT_ALONG.keys()
    }
    assert unknown == set()
    assert set(BROUGHT_ALONG.values()) <= declared


def _imported(path: Path) -> set[str]:
    ours = {"megatron_dattn", "tools", "examples", "benchmarks"}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
    return {name for name in found if name.split(".")[0] not in sys.stdlib_module_names | ours}


def _distribution(module: str) -> str:
    if module.startswith("megatron."):
        return "megatron-energon" if module.startswith("megatron.energon") else "megatron-core"
    top = module.split(".")[0]
    return canonicalize_name(NAMES.get(top, top))

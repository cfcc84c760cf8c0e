"""One list says with which versions of transformers exports were tested; promises obey it.

An untested version is an error at load, not an answer that nobody has looked at.
"""

import importlib
import importlib.metadata
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from megatron_dattn.conversion.hf_export.config import OLDEST_STOCK
from megatron_dattn.hf import configuration_dattn, processing_dattn
from megatron_dattn.hf.versions_dattn import (
    NEWEST_TESTED,
    OLDEST_TESTED,
    OVERRIDE,
    TESTED_RANGE,
    check_transformers,
)
from tests.readers.table import BEGIN, DOCUMENT, END
from tests.readers.versions import LOCKED, NEWEST, READERS

ROOT = Path(__file__).resolve().parents[3]
OF_OUR_CODE = [reader.version for reader in READERS if not reader.stock_only]


def test_the_code_admits_what_was_tested() -> None:
    assert OF_OUR_CODE[0] == OLDEST_TESTED
    assert NEWEST == NEWEST_TESTED
    assert READERS[0].version == OLDEST_STOCK


def test_the_package_admits_what_was_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ours,) = (
        requirement
        for requirement in map(Requirement, project["dependencies"])
        if requirement.name == "transformers"
    )
    assert str(ours.specifier) == str(Requirement(f"transformers{TESTED_RANGE}").specifier)
    lock = (ROOT / "requirements.lock").read_text()
    assert f"\ntransformers=={LOCKED}\n" in lock


def test_the_tables_have_every_version_and_no_failure() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    tables = text.split(BEGIN)[1].split(END)[0]
    heads = re.findall(r"^\| transformers \| (.+) \|$", tables, re.MULTILINE)
    assert [head.split(" | ") for head in heads] == [
        OF_OUR_CODE,
        [reader.version for reader in READERS],
    ]
    assert "failed" not in tables


def install(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)


@pytest.mark.parametrize("version", OF_OUR_CODE)
def test_tested_versions_load(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(version, monkeypatch)
    check_transformers()


@pytest.mark.parametrize("version", ["4.57.6", "5.9.0", "5.10.0", "5.25.0", "5.24.1", "6.0.0"])
@pytest.mark.parametrize("module", [configuration_dattn, processing_dattn])
def test_an_untested_version_is_one_clear_error(
    version: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(version, monkeypatch)
    monkeypatch.delenv(OVERRIDE, raising=False)
    with pytest.raises(ImportError) as raised:
        importlib.reload(module)
    (line,) = str(raised.value).splitlines()
    for word in (version, OLDEST_TESTED, NEWEST_TESTED, OVERRIDE):
        assert word in line


def test_who_wants_to_try_may(monkeypatch: pytest.MonkeyPatch) -> None:
    install("6.0.0", monkeypatch)
    monkeypatch.setenv(OVERRIDE, "1")
    check_transformers()

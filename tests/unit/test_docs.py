"""Pages that name settings, files, reasons and exit codes name those that there are."""

import re
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from megatron_dattn.config.documentation import sections
from megatron_dattn.config.flags import expand_short_flags
from megatron_dattn.data.problems import (
    DUPLICATE_ID,
    DUPLICATE_IMAGE,
    DUPLICATE_RECORD,
    problem_table,
)
from megatron_dattn.data.rejection import Reason
from megatron_dattn.training import exit_reason
from tests.unit.test_imports import ALLOWED, INNER

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")],
    key=str,
)
WRITTEN = [page for page in PAGES if page.name not in ("settings.md", "CHANGELOG.md")]
every_page = pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))

# Of files that are named without a folder too. Others (.json, .yaml) are users' as a rule.
KINDS = (".py", ".sh", ".sbatch")
SECTIONS = ("model", "parallel", "data", "optimizer", "training", "checkpoint", "logging")
FOLDERS = ("megatron_dattn", "tools", "tests", "docs", "examples", "benchmarks")


@cache
def files() -> frozenset[str]:
    """The files of the folders and of the root, as paths from the root."""
    found = [
        *ROOT.glob("*.*"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")),
    ]
    return frozenset(str(path.relative_to(ROOT)) for path in found if path.suffix != ".pyc")


@cache
def names() -> frozenset[str]:
    """All settings and their sections."""
    found = {setting.name for section in sections() for setting in section.settings}
    found |= {section.name for section in sections()}
    return frozenset(found | {name.partition(".")[0] for name in found})


def spoken(page: Path) -> list[str]:
    """What stands in backticks in a page's text; code blocks are left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", text)


def is_there(name: str) -> bool:
    """Whether a file or folder of this name is in the repository, in whatever folder."""
    name = name.rstrip("/")
    if name.split("/")[0] in FOLDERS and (ROOT / name).exists():
        return True
    return any(fnmatch(file, pattern) for file in files() for pattern in (name, f"*/{name}"))


@every_page
def test_settings_exist(page: Path) -> None:
    pattern = re.compile(rf"(?:--)?((?:{'|'.join(SECTIONS)})\.[a-z_.\[\]]*[a-z_])(?::? .*)?")
    found = [match[1] for word in spoken(page) if (match := pattern.fullmatch(word))]
    files_too = [name for name in found if not name.endswith(("yaml", "json", "py", "md", "zip"))]
    assert [name for name in files_too if name not in names()] == []


@every_page
def test_files_exist(page: Path) -> None:
    found = []
    for word in spoken(page):
        path = word.split(":")[0].split(" ")[-1 if word.startswith("python ") else 0]
        is_path = re.fullmatch(r"[\w./*-]+", path) is not None
        in_folder = path.split("/")[0] in FOLDERS and "/" in path and "..." not in path
        if is_path and (path.endswith(KINDS) or in_folder):
            found.append(path)
    assert [path for path in found if not is_there(path)] == []


@every_page
def test_names_behind_a_file_stand_in_it(page: Path) -> None:
    pattern = re.compile(r"([\w/]+\.py): (\w[\w.]*)(?:\(.*\))?")
    for word in spoken(page):
        if match := pattern.fullmatch(word):
            sources = [ROOT / file for file in files() if f"/{file}".endswith(f"/{match[1]}")]
            part = match[2].rpartition(".")[2]
            assert any(re.search(rf"\b{part}\b", path.read_text()) for path in sources), word


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.M)
            anchors = [re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in headings]
            assert anchor in anchors, target


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the rows of the first table behind a heading, without its head."""
    _, _, text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(heading)
    lines = re.search(r"(?:^\|.*\n)+", text, re.M)
    assert lines is not None
    return [[cell.strip() for cell in line[1:-2].split("|")] for line in lines[0].split("\n")[2:-1]]


def test_every_problem_of_a_record_has_its_row() -> None:
    rows = table("data.md", "## Records that are not used")
    names = [*map(str, Reason), DUPLICATE_ID, DUPLICATE_RECORD, DUPLICATE_IMAGE]
    assert [row[0].strip("`") for row in rows] == names
    assert all(len(row) == 5 and all(row) for row in rows)
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert problem_table() in page, "put in what problems.py's problem_table() writes"


def test_every_ending_of_a_run_has_its_exit_code() -> None:
    rows = table("debugging.md", "## How a run ends")
    written = {row[0].strip("`"): int(row[1]) for row in rows}
    endings = [exit_reason.ExitReason(reason) for reason in get_args(exit_reason.Reason)]
    assert written == {ending.reason: ending.exit_code for ending in endings}


def test_every_package_stands_in_the_design() -> None:
    rows = [row[0].strip("-` /") for row in table("design.md", "## The packages")]
    inner = [f"{package}/{name}" for package, folders in INNER.items() for name in folders]
    outer = [package for package in ALLOWED if (ROOT / "megatron_dattn" / package).is_dir()]
    assert sorted(rows) == sorted([*outer, *inner])


def test_flags_that_are_the_same_are_taken() -> None:
    rows = table("coming_from.md", "## From Megatron-LM")
    same = [flag for row in rows if row[1].startswith("same") for flag in row[0].split(", ")]
    assert len(same) > 20
    for flag in same:
        (expanded, _) = expand_short_flags([flag.strip("`"), "1"])
        assert expanded.removeprefix("--") in names(), flag


def test_flags_that_are_not_there_are_none() -> None:
    """A flag that a page says is missing is not taken, in Megatron's spelling or LLaVA's."""
    for heading in ("## From Megatron-LM", "## From LLaVA"):
        for row in table("coming_from.md", heading):
            gone = row[0] if row[1].startswith("there is none") else ""
            gone += "".join(re.findall(r"((?:`--[\w-]+`(?:, )?)+): there is none", row[1]))
            for flag in re.findall(r"`(--[\w-]+)", gone):
                assert expand_short_flags([flag, "1"])[0] == flag


def test_the_page_on_installation_names_the_locked_torch() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    page = (ROOT / "docs" / "install.md").read_text()
    assert set(re.findall(r"torch==[\d.]+", page)) == set(re.findall(r"^torch==.+$", lock, re.M))
    wanted = re.search(r'"transformer-engine\[pytorch\]>=([\d.]+),<(\d+)\.(\d+)"', _pyproject())
    assert wanted is not None
    assert f"{wanted[1]} to {wanted[2]}.{int(wanted[3]) - 1} " in page


def _pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text()

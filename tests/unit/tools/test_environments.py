"""`make` takes an interpreter that really works, says which, and makes its environment once.

The interpreters are fakes on a PATH of their own: each runs this Python with another version, or
without a module, or does not run at all.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = ("bash", "cat", "cksum", "cut", "dirname", "env", "grep", "head", "ls", "mkdir", "sed")
SCRIPTS = ("find_python.sh", "make_environment.sh")
# Answers `-c` with the given facts; writes down what it would install, and copies itself as venv.
FAKE = """#!{bash}
if [[ $1 == -c ]]; then
    exec {python} -S -c "import sys, sysconfig
sys.version_info = {version}
sys.executable = '$0'
sys.modules.update(dict.fromkeys({absent}))
{more}
exec(sys.argv[1])" "$2"
fi
echo "{name} ${{*:1:3}}" >> "{calls}"
if [[ $2 == venv ]]; then
    {mkdir} -p "$4/bin" && {cp} "$0" "$4/bin/python" && echo > "$4/pyvenv.cfg"
fi
"""
SHIM = "#!{bash}\necho 'pyenv: {name}: command not found' >&2\nexit 127\n"


class Machine:
    """A machine with exactly these interpreters, and a checkout of the scripts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.root = folder, folder / "bin", folder / "checkout"
        self.calls = folder / "calls"
        self.bin.mkdir()
        for program in PROGRAMS:
            (self.bin / program).symlink_to(str(shutil.which(program)))
        (self.root / "tools").mkdir(parents=True)
        for name in SCRIPTS:
            shutil.copy(ROOT / "tools" / name, self.root / "tools")
        self.admit(">=3.11,<3.14")
        (self.root / "requirements.lock").write_text("numpy==1\ntorch==2.13.0\n")

    def admit(self, versions: str) -> None:
        (self.root / "pyproject.toml").write_text(f'name = "x"\nrequires-python = "{versions}"\n')

    def add(
        self,
        name: str,
        version: tuple[int, int, int],
        absent: tuple[str, ...] = (),
        more: str = "",
    ) -> Path:
        """Put an interpreter at a path below the folder; a bare name stands on PATH."""
        text = FAKE.format(
            python=sys.executable,
            bash=shutil.which("bash"),
            mkdir=shutil.which("mkdir"),
            cp=shutil.which("cp"),
            version=version,
            absent=absent,
            more=more,
            name=name,
            calls=self.calls,
        )
        return self._write(name, text)

    def add_shim(self, name: str) -> Path:
        """A pyenv shim without an active version behind it."""
        return self._write(name, SHIM.format(bash=shutil.which("bash"), name=name))

    def _write(self, name: str, text: str) -> Path:
        path = self.folder / name if "/" in name else self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "HOME": str(self.folder), **variables}
        command = [str(self.bin / "bash"), str(self.root / "tools" / script), *words]
        return subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True
        )

    def find(self, *words: str, **variables: str) -> list[str]:
        done = self.run("find_python.sh", *words, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def installed(self) -> list[str]:
        """What the interpreters were asked to do since the last question."""
        text = self.calls.read_text() if self.calls.exists() else ""
        self.calls.write_text("")
        return text.splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_first_that_runs_is_taken_and_named(machine: Machine) -> None:
    machine.add_shim("python3.11")
    second = machine.add("python3.12", (3, 12, 1))
    machine.add("python3", (3, 13, 0))
    done = machine.run("find_python.sh")
    assert done.stdout == f"3.12.1 {second}\n"
    assert f"Python 3.12.1 of {second} is taken" in done.stderr


def test_a_later_place_on_path_is_tried_too(machine: Machine) -> None:
    machine.add_shim("shims/python3.11")
    machine.add("python3.11", (3, 11, 2))
    path = f"{machine.folder}/shims{os.pathsep}{machine.bin}"
    assert machine.find(PATH=path) == [f"3.11.2 {machine.bin}/python3.11"]


def test_those_of_pyenv_are_found_without_shims(machine: Machine) -> None:
    machine.add("python3", (3, 9, 2))
    for version in ((3, 10, 13), (3, 13, 0), (3, 14, 0)):
        name = ".".join(map(str, version))
        machine.add(f".pyenv/versions/{name}/bin/python3", version)
        machine.add(f"elsewhere/versions/{name}/bin/python3", version)
    inner = "versions/3.13.0/bin/python3"
    assert machine.find() == [f"3.13.0 {machine.folder}/.pyenv/{inner}"]
    root = machine.folder / "elsewhere"
    assert machine.find(PYENV_ROOT=str(root)) == [f"3.13.0 {root}/{inner}"]


def test_all_are_listed_once_per_version(machine: Machine) -> None:
    machine.add("python3.11", (3, 11, 2))
    machine.add("python3.13", (3, 13, 0))
    machine.add("python3", (3, 11, 2))
    machine.add(".pyenv/versions/3.11.7/bin/python3", (3, 11, 7))
    versions = [line.split()[0] for line in machine.find("--all")]
    assert versions == ["3.11.2", "3.13.0", "3.11.7"]


def test_the_range_is_that_of_pyproject(machine: Machine) -> None:
    machine.add("python3.11", (3, 11, 9))
    machine.add("python3.12", (3, 12, 1))
    machine.admit(">=3.12,<3.13")
    assert machine.find() == [f"3.12.1 {machine.bin}/python3.12"]


def test_nothing_suitable_is_an_error_with_every_reason_and_the_remedy(machine: Machine) -> None:
    machine.add_shim("python3.13")
    machine.add("python3.12", (3, 12, 1), absent=("ensurepip",))
    machine.add("python3.11", (3, 11, 1), more="sysconfig.get_config_var = lambda name: 1")
    machine.add("python3", (3, 14, 0))
    machine.add("python", (2, 7, 18))
    done = machine.run("find_python.sh")
    assert done.returncode != 0
    assert done.stdout == ""
    for reason in (
        "no Python >=3.11,<3.14",
        "python3.13: pyenv: python3.13: command not found",
        "python3.12: is Python 3.12.1 without ensurepip",
        "python3.11: is no ordinary CPython",
        "python3: is Python 3.14.0",
        "python: is Python 2.7.18",
        "apt install",
        "make PYTHON=",
    ):
        assert reason in done.stderr


def test_a_machine_without_python_gets_the_remedy(machine: Machine) -> None:
    done = machine.run("find_python.sh")
    assert done.returncode != 0
    assert "no python on PATH" in done.stderr
    assert "apt install" in done.stderr


def test_a_named_interpreter_is_taken_or_refused_but_never_replaced(machine: Machine) -> None:
    machine.add("python3.11", (3, 11, 2))
    named = machine.add("opt/python", (3, 12, 4))
    assert machine.find(PYTHON=str(named)) == [f"3.12.4 {named}"]
    assert machine.find(PYTHON="python3.11") == [f"3.11.2 {machine.bin}/python3.11"]
    for name in (str(machine.add("opt/old", (3, 10, 0))), str(machine.add_shim("shim")), "absent"):
        done = machine.run("find_python.sh", PYTHON=name)
        assert done.returncode != 0
        assert f"PYTHON={name} cannot be used" in done.stderr


def test_an_environment_is_made_once_and_brought_up_to_date(machine: Machine) -> None:
    machine.add("python3.11", (3, 11, 2))
    first = machine.run("make_environment.sh", "venv")
    assert first.returncode == 0, first.stderr
    assert "Python 3.11.2" in first.stderr
    made = machine.installed()
    assert made[0] == "python3.11 -m venv --clear"
    assert made[1:] == ["python3.11 -m pip install"] * 3
    assert machine.run("make_environment.sh", "venv").returncode == 0
    assert machine.installed() == []
    (machine.root / "requirements.lock").write_text("numpy==2\ntorch==2.13.0\n")
    assert machine.run("make_environment.sh", "venv").returncode == 0
    assert machine.installed() == ["python3.11 -m pip install"] * 3  # torch is not fetched again


def test_an_environment_keeps_its_interpreter_until_another_is_named(machine: Machine) -> None:
    machine.add("python3.12", (3, 12, 1))
    machine.run("make_environment.sh", "venv")
    machine.add("python3.11", (3, 11, 2))  # would come first now
    machine.installed()
    machine.run("make_environment.sh", "venv")
    assert machine.installed() == []
    machine.run("make_environment.sh", "venv", PYTHON="python3.11")
    assert machine.installed()[0] == "python3.11 -m venv --clear"
    machine.admit(">=3.12,<3.14")  # the environment's own is out of range now
    machine.run("make_environment.sh", "venv")
    assert machine.installed()[0] == "python3.12 -m venv --clear"


def test_another_lock_and_the_interpreters_that_it_needs(machine: Machine) -> None:
    machine.add("python3.11", (3, 11, 2))
    machine.add("python3.12", (3, 12, 1))
    (machine.root / "newest.lock").write_text("numpy==3\ntorch==2.14.0\n")
    newest = ("make_environment.sh", "venv", "newest.lock")
    machine.run(*newest, ADMITTED=">=3.12,<3.14")
    assert machine.installed() == ["python3.12 -m venv --clear", *["python3.12 -m pip install"] * 3]
    (machine.root / "requirements.lock").write_text("numpy==2\ntorch==2.13.0\n")
    machine.run(*newest, ADMITTED=">=3.12,<3.14")
    assert machine.installed() == []


def test_a_folder_with_other_things_is_not_cleared(machine: Machine) -> None:
    machine.add("python3.11", (3, 11, 2))
    precious = machine.folder / "work" / "results"
    precious.parent.mkdir()
    precious.write_text("years")
    done = machine.run("make_environment.sh", "work")
    assert done.returncode != 0
    assert "other things" in done.stderr
    assert precious.exists()
    assert machine.installed() == []


def test_make_hands_the_interpreter_on() -> None:
    done = subprocess.run(
        ["make", "install", "PYTHON=/no/such/python"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "PYTHON=/no/such/python cannot be used" in done.stderr

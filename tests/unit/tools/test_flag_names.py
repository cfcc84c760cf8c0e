"""Every command takes flags by their full names alone, and names the nearest to any other."""

import ast
import importlib
from pathlib import Path

import pytest

from megatron_dattn.runtime.tool import ToolParser

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("tools", "benchmarks", "examples/quickstart")
# It runs beside an export, where nothing of ours is installed.
WITHOUT_US = "examples/quickstart/ask.py"


def _calls(path: Path) -> list[ast.Call]:
    return [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]


def _makes(path: Path, parser: str) -> bool:
    return any(ast.unparse(call.func).endswith(parser) for call in _calls(path))


SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
COMMANDS = [path for path in SOURCES if _makes(path, "ToolParser")]


def test_no_command_has_a_parser_of_its_own() -> None:
    others = [path for path in SOURCES if _makes(path, "ArgumentParser")]
    assert [str(path.relative_to(ROOT)) for path in others] == [WITHOUT_US]
    (made,) = (c for c in _calls(ROOT / WITHOUT_US) if "ArgumentParser" in ast.unparse(c.func))
    assert "allow_abbrev=False" in ast.unparse(made)
    assert len(COMMANDS) > 20


class _Parsed(Exception):
    """Carries the parser of a command that would begin its work now."""


def _parser_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> ToolParser:
    def stop(parser: ToolParser, *arguments: object) -> None:
        raise _Parsed(parser)

    with monkeypatch.context() as patch:
        patch.setattr(ToolParser, "parse_args", stop)
        patch.setattr("sys.argv", [path.name])
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        module = importlib.import_module(name)
        begin = next(
            getattr(module, found)
            for found in ("parse_arguments", "parse_options", "parse", "main")
            if hasattr(module, found)
        )
        with pytest.raises(_Parsed) as parsed:
            begin([]) if begin.__code__.co_argcount else begin()
    parser = parsed.value.args[0]
    assert isinstance(parser, ToolParser)
    return parser


def _with_subcommands(parser: ToolParser) -> list[ToolParser]:
    choices = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    inner = [value for found in choices for value in found.values()]
    return [parser, *(value for value in inner if isinstance(value, ToolParser))]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_shortened_name_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = 0
    for parser in _with_subcommands(_parser_of(path, monkeypatch)):
        flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        for flag in flags:
            if flag[:-1] in flags:
                continue
            with pytest.raises(SystemExit) as stop:
                parser.parse_args([f"{flag[:-1]}=x"])
            assert stop.value.code == 2
            said = capsys.readouterr().err
            assert f"unrecognized arguments: {flag[:-1]}; the nearest is --" in said
            checked += 1
    assert checked

"""Help and page explain every setting, in the words that stand beside its field."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dattn.config.cli import parse_command_line
from megatron_dattn.config.documentation import page, sections

ROOT = Path(__file__).resolve().parents[3]


def test_every_setting_is_explained() -> None:
    settings = [setting for section in sections() for setting in section.settings]
    assert len(settings) > 90
    assert not [setting.name for setting in settings if not setting.text]


def test_the_page_is_what_the_fields_say() -> None:
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == page(), (
        "run `python -m megatron_dattn.config.documentation > docs/settings.md`"
    )


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for section in sections():
        for setting in section.settings:
            assert f"--{setting.name} ({setting.kind}; default {setting.default})" in shown


def test_types_and_defaults_are_said_in_the_words_of_a_file() -> None:
    found = {setting.name: setting for section in sections() for setting in section.settings}
    stage, norm = found["training.stage"], found["model.adapter.norm"]
    assert (stage.kind, stage.default) == ("text", "stage1")
    assert (norm.kind, norm.default) == ("before | behind | both | none or null", "null")
    assert found["parallel.sequence_parallel"].default == "false"
    assert found["data.train[].path"].default == "required"
    assert found["data.train"].kind == "list of {path, image_root, weight, split}"


def test_help_needs_no_torch() -> None:
    """Which takes seconds to be imported."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "pretrain_vlm.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not names & {"torch", "numpy", "transformers", "megatron"}


def test_a_reader_of_the_first_line_only_causes_no_error() -> None:
    command = [sys.executable, str(ROOT / "pretrain_vlm.py"), "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as shown:
        assert shown.stdout is not None
        assert shown.stderr is not None
        assert shown.stdout.read(6) == b"usage:"
        shown.stdout.close()
        assert shown.stderr.read() == b""
    assert shown.returncode == 0

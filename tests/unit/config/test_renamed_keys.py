"""Files and commands of an older version are read as what they meant."""

from pathlib import Path
from typing import Any

import pytest

from megatron_dattn.config.cli import load_config, parse_command_line
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.renamed_keys import RENAMED, current_name, with_current_keys
from megatron_dattn.errors import ConfigError
from megatron_dattn.models.execution import ExactSavings

# Old setting: a value other than the default, as old files write it, and what it means.
OLD_VALUES: dict[str, tuple[str, object]] = {
    "training.precision": ("fp32", "fp32"),
    "training.recompute": ("selective", "selective"),
    "training.attention_backend": ("math", "math"),
    "training.transformer_impl": ("local", "local"),
    "training.fp8": ("e4m3", "e4m3"),
    "training.savings.visual_queries": ("false", False),
    "training.savings.folded_output": ("off", False),
    "training.savings.unread_tokens": ("no", False),
    "training.savings.unread_rows": ("off", False),
    "training.savings.labelled_logits": ("false", False),
    "training.savings.ffn_chunk_tokens": ("2048", 2048),
    "training.savings.ffn_chunk_rows": ("2e3", 2000),
}


def _file(folder: Path, name: str, values: dict[str, str]) -> Path:
    content = "{}"
    for key, value in values.items():
        *sections, last = key.split(".")
        text = f"{last}: {value}"
        for section in reversed(sections):
            text = f"{section}: {{{text}}}"
        content = f"{{{text}}}" if content == "{}" else f"{content[:-1]}, {text}}}"
    path = folder / name
    path.write_text(content)
    return path


def _value(config: PretrainConfig, key: str) -> object:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def test_every_renamed_key_is_tried() -> None:
    tried = {old for old in RENAMED for key in OLD_VALUES if f"{key}.".startswith(f"{old}.")}
    assert tried == set(RENAMED)


@pytest.mark.parametrize("old", OLD_VALUES)
def test_an_old_key_is_read_as_what_it_meant(tmp_path: Path, old: str) -> None:
    word, meaning = OLD_VALUES[old]
    new = current_name(old)
    assert new.startswith("execution.")
    assert _value(PretrainConfig(), new) != meaning
    file = _file(tmp_path, "old.yaml", {old: word})
    expected = parse_command_line([f"--{new}", word]).config
    assert _value(expected, new) == meaning
    assert load_config(file) == expected
    assert parse_command_line([f"--{old}", word]).config == expected
    assert parse_command_line([f"--{old}={word}"]).config == expected
    assert parse_command_line(["--config", file.read_text()]).config == expected


def test_a_whole_old_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "training:\n  seed: 3\n  precision: fp32\n  recompute: full\n  attention_backend: math\n"
        "  transformer_impl: local\n  fp8: none\n"
        "  savings: {visual_queries: false, unread_rows: false, ffn_chunk_rows: 64}\n"
    )
    config = load_config(path)
    assert config.training.seed == 3
    assert config.execution.precision == "fp32"
    assert config.execution.recompute == "full"
    assert config.execution.attention_backend == "math"
    assert config.execution.transformer_impl == "local"
    assert config.execution.savings == ExactSavings(
        visual_queries=False, unread_tokens=False, ffn_chunk_tokens=64
    )


def test_of_an_old_and_a_new_file_the_later_one_wins(tmp_path: Path) -> None:
    old = _file(tmp_path, "old.yaml", {"training.recompute": "full"})
    new = _file(tmp_path, "new.yaml", {"execution.recompute": "selective"})
    assert load_config(old, new).execution.recompute == "selective"
    assert load_config(new, old).execution.recompute == "full"
    argv = ["--config", str(new), "--training.recompute", "full"]
    assert parse_command_line(argv).config.execution.recompute == "full"


@pytest.mark.parametrize("old", RENAMED)
def test_a_value_under_both_names_is_refused(old: str) -> None:
    content: dict = {}
    for key in (old, RENAMED[old]):
        *sections, name = key.split(".")
        inner = content
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = 1
    with pytest.raises(ConfigError, match=f"{old} is the old name of {RENAMED[old]}"):
        with_current_keys(content)


def test_a_file_with_both_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text("{training: {precision: fp32}, execution: {precision: bf16}}")
    with pytest.raises(ConfigError, match=r"leave training\.precision out"):
        load_config(path)


@pytest.mark.parametrize("key", ["precision", "savings"])
def test_an_old_key_within_a_section_on_the_command_line_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"training.{key} is the old name of execution.{key}"):
        parse_command_line(["--training", f"{{seed: 1, {key}: }}"])


def test_a_mistake_in_an_old_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("training:\n  savings:\n    visual_queries: maybe\n")
    with pytest.raises(ConfigError, match=r"line 3: training\.savings\.visual_queries: .*maybe"):
        load_config(path)


@pytest.mark.parametrize("execution", [None, {}])
def test_an_empty_new_section_takes_what_moves_there(execution: dict | None) -> None:
    content = {"training": {"precision": "fp32"}, "execution": execution}
    assert with_current_keys(content) == {"training": {}, "execution": {"precision": "fp32"}}


def test_other_content_is_left_alone() -> None:
    content = {"training": {"seed": 1}, "model": None, "data": {"train": [{"path": "a"}]}}
    assert with_current_keys(content) == content

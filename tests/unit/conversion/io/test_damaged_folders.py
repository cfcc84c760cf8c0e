"""Hugging Face folders that broke on their way, or were edited: one error, and soon."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_dattn.conversion.hf_import.plan import plan_import, plan_whole_import
from megatron_dattn.conversion.io.safetensors_reader import SafetensorsFolder
from megatron_dattn.data.tokenizer import generation_ends, load_tokenizer
from megatron_dattn.errors import CheckpointError, ConfigError, UserError
from tests.support.time_limit import time_limit
from tests.unit.conversion.hf_models import save_language, save_vision
from tests.unit.conversion.llava_models import save_llava

# Seconds; a million layers took minutes and a gigabyte.
SOON = 60.0
MILLION = 1_000_000


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("sound")
    save_vision(base / "vision")
    save_language(base / "language")
    save_llava(base / "llava")
    return base


@pytest.fixture
def base(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "base"))


def plan(base: Path) -> None:
    with time_limit(SOON):
        plan_import(base / "vision", base / "language", base / "out")


def edit(path: Path, section: str | None = None, **changes: object) -> None:
    content = json.loads(path.read_text())
    (content if section is None else content[section]).update(changes)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("part", ["vision", "language"])
def test_more_layers_than_tensors(base: Path, part: str) -> None:
    edit(base / part / "config.json", num_hidden_layers=MILLION)
    with pytest.raises(CheckpointError, match=r"describes 1000000 layers, but there are only \d+"):
        plan(base)


@pytest.mark.parametrize("section", ["vision_config", "text_config"])
def test_more_layers_than_tensors_in_a_whole_model(base: Path, section: str) -> None:
    edit(base / "llava" / "config.json", section, num_hidden_layers=MILLION)
    with (
        time_limit(SOON),
        pytest.raises(CheckpointError, match=r"describes 1000000 layers, but there are only \d+"),
    ):
        plan_whole_import(base / "llava", base / "out")


@pytest.mark.parametrize("number", [MILLION, 10**12, 10**90], ids=["1e6", "1e12", "1e90"])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("language", "vocab_size"),
        ("language", "hidden_size"),
        ("language", "intermediate_size"),
        ("language", "num_attention_heads"),
        ("language", "head_dim"),
        ("language", "num_hidden_layers"),
        ("vision", "hidden_size"),
        ("vision", "image_size"),
        ("vision", "intermediate_size"),
    ],
)
def test_sizes_that_no_weights_have(base: Path, part: str, name: str, number: int) -> None:
    edit(base / part / "config.json", **{name: number})
    with pytest.raises(UserError):
        plan(base)


@pytest.mark.parametrize("part", ["vision", "language"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested deeper"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "integer of 5000 digits"),
        ('{"hidden_size": 1, "hidden_size": 2}', 'key "hidden_size" twice'),
        ("[]", "must hold a JSON object"),
        ("\0" * 100, "not valid JSON"),
    ],
)
def test_a_config_that_is_no_sane_json(base: Path, part: str, content: str, message: str) -> None:
    (base / part / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"{part}/config\.json .*{message}"):
        plan(base)


def make_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, make_endless])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("language", "config.json"),
        ("vision", "config.json"),
        ("language", "tokenizer.json"),
        ("vision", "preprocessor_config.json"),
        ("vision", "model.safetensors"),
    ],
)
def test_what_is_no_file_is_not_waited_for(
    base: Path, part: str, name: str, make: Callable[[Path], None]
) -> None:
    (base / part / name).unlink()
    make(base / part / name)
    with pytest.raises(UserError, match=rf"{part}.*({name}|no weights)"):
        plan(base)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, make_endless])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_a_tokenizer_s_file_that_is_none(
    base: Path, name: str, make: Callable[[Path], None]
) -> None:
    folder = base / "language"
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with time_limit(SOON), pytest.raises(ConfigError, match=f"{name} cannot be read: it is a"):
        load_tokenizer(str(folder), template="plain")


def test_the_ends_of_answers_are_read_from_a_sane_file(base: Path) -> None:
    folder, tokenizer = base / "language", load_tokenizer
    path = folder / "generation_config.json"
    path.unlink(missing_ok=True)
    assert generation_ends(str(folder), tokenizer) == frozenset()  # type: ignore[arg-type]
    for content, message in (("[" * 5000, "nested"), ("[1]", "JSON object"), (None, "named pipe")):
        path.unlink(missing_ok=True)
        os.mkfifo(path) if content is None else path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            generation_ends(str(folder), tokenizer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "file", [3, None, ["a"], {"a": 1}, "../two.safetensors", "/dev/zero", "", ".", "..", "a\0b"]
)
def test_an_index_names_files_beside_it(tmp_path: Path, file: object) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"has b in .*, which is no name of a file"):
        SafetensorsFolder(tmp_path)

"""A stage's run folder has all that is known of its tokenizer, also what came from an import."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.errors import CheckpointError
from megatron_dattn.training.run_folder import describe_again, describe_run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """As an import leaves it."""
    folder = tmp_path / "import" / "tokenizer"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (folder / name).write_text(name)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}))
    (folder / "model.safetensors").write_text("not for the run folder")
    return folder


def test_stages_hand_the_tokenizer_and_what_ends_answers_on(source, tmp_path):
    config = PretrainConfig()
    for stage in ("one", "two"):
        config = replace(config, data=replace(config.data, tokenizer=str(source)))
        describe_run(config, tmp_path / stage)
        copied = tmp_path / stage / "tokenizer"
        assert {path.name: path.read_text() for path in copied.iterdir()} == {
            path.name: path.read_text() for path in source.iterdir() if path.suffix == ".json"
        }
        source = copied


def test_a_run_folder_that_was_deleted_is_described_again(source, tmp_path, caplog):
    config = PretrainConfig()
    config = replace(config, data=replace(config.data, tokenizer=str(source)))
    folder = tmp_path / "run"
    describe_run(config, folder)
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    describe_again(config, folder)
    assert not caplog.records
    shutil.rmtree(folder)
    describe_again(config, folder)
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert len(caplog.messages) == 1
    assert "the checkpoints that were in it are gone" in caplog.text


def test_a_tokenizer_that_lay_in_the_deleted_folder_is_missed(source, tmp_path, caplog):
    config = PretrainConfig()
    config = replace(config, data=replace(config.data, tokenizer=str(source)))
    shutil.rmtree(source)
    (tmp_path / "run" / "step-0000002").mkdir(parents=True)
    describe_again(config, tmp_path / "run")
    first, second = caplog.messages
    assert "are gone" not in first
    assert second.endswith("cannot be written again: it came from the same folder")


def test_a_file_in_the_run_folder_s_place(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="replaced under this run by something that is no"):
        describe_again(PretrainConfig(), tmp_path / "run")

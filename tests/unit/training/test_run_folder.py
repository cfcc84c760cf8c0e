"""A stage's run folder has all that is known of its tokenizer, also what came from an import."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.training.run_folder import describe_run


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

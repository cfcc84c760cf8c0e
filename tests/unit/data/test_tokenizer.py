"""Tokenizers that would train the wrong thing are refused."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_dattn.data.tokenizer import load_tokenizer, padding_id, special_token_ids
from megatron_dattn.errors import ConfigError
from tests.unit.data.builders import save_processor


def test_a_good_tokenizer_loads(processor: Path) -> None:
    tokenizer = load_tokenizer(str(processor), template="mistral_v3", vocab_size=512)
    assert padding_id(tokenizer) == tokenizer.unk_token_id == 0
    special = special_token_ids(tokenizer)
    assert tokenizer.convert_tokens_to_ids("[control_8]") in special
    assert tokenizer.unk_token_id not in special


@pytest.mark.parametrize("token", ["<image>", "[INST]"])
def test_a_missing_control_token_is_named(tmp_path: Path, token: str) -> None:
    folder = save_processor(tmp_path / "processor")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(json.dumps(token), json.dumps("<other>")))
    with pytest.raises(ConfigError, match=f"no special token '{token}'".replace("[", r"\[")):
        load_tokenizer(str(folder), template="mistral_v3")


def test_the_plain_template_needs_no_instruction_tokens(tmp_path: Path) -> None:
    folder = save_processor(tmp_path / "processor")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"[INST]"', '"[OTHER]"'))
    load_tokenizer(str(folder), template="plain")


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_tokenizer(str(tmp_path), template="plain")


@pytest.mark.parametrize("content", ["{}", '{"model": {"type": "BPE"}}', "{"])
def test_json_that_is_no_tokenizer_is_one_error(
    processor: Path, tmp_path: Path, content: str
) -> None:
    folder = Path(shutil.copytree(processor, tmp_path / "broken"))
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"no tokenizer can be loaded from '.*broken'"):
        load_tokenizer(str(folder), template="plain")


def test_a_tokenizer_is_read_once_while_its_files_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks of a start and each of its loaders ask for it; large ones take a second."""
    folder = save_processor(tmp_path / "tokenizer")
    reads, read = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *args, **kwargs: reads.append(1) or read(*args)
    )
    first = load_tokenizer(str(folder), template="mistral_v3")
    assert load_tokenizer(str(folder), template="mistral_v3") is first
    assert len(reads) == 1
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")
    load_tokenizer(str(folder), template="mistral_v3")
    assert len(reads) == 2

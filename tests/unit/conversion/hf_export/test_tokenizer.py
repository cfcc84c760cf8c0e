"""An export's tokenizer is training's, alike in every file, and never adds a token of its own."""

import json
import logging
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_dattn.conversion.hf_export.tokenizer import write_tokenizer
from megatron_dattn.conversion.hf_import.tokenizer import copy_tokenizer
from megatron_dattn.conversion.io.tokenizer_files import chat_template, write_chat_template
from megatron_dattn.data.tokenizer import load_tokenizer
from tests.unit.data.builders import SPECIAL_TOKENS, make_tokenizer

RESERVED = SPECIAL_TOKENS.index("[control_8]")
BOS = [("<s>", 1)]
ADDING_BOS = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", BOS)


def tokenizer_folder(folder: Path, *, image: bool = False) -> Path:
    """As a language model ships it: `<s>` before every text, and sentencepiece's own file."""
    tokenizer = make_tokenizer(SPECIAL_TOKENS if image else SPECIAL_TOKENS[:-1])
    tokenizer.backend_tokenizer.post_processor = ADDING_BOS
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"add_prefix_space": True, "chat_template": "{{ 'stale' }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    write_pieces(folder, tokenizer)
    return folder


def write_pieces(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = sentencepiece_model_pb2.ModelProto()
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.normalizer_spec.name = "identity"
    for index in range(len(tokenizer)):
        name = tokenizer.convert_ids_to_tokens(index)
        kind = kinds.UNKNOWN if index == 0 else kinds.CONTROL if index < 7 else kinds.NORMAL
        model.pieces.add(piece=name, score=-index, type=kind)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def export(run: Path, target: Path) -> Path:
    target.mkdir()
    tokenizer = load_tokenizer(str(run), template="mistral_v3")
    write_tokenizer(tokenizer, run, target, pad_token="<unk>")
    write_chat_template(target, chat_template("mistral_v3"))
    return target


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    copy_tokenizer(tokenizer_folder(tmp_path / "origin"), tmp_path / "run")
    return export(tmp_path / "run", tmp_path / "out")


def pieces(folder: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_both_tokenizer_files_call_the_entry_image(tmp_path: Path, exported: Path) -> None:
    assert pieces(tmp_path / "origin").id_to_piece(RESERVED) == "[control_8]"
    for folder in (tmp_path / "run", exported):
        vocabulary = load_tokenizer(str(folder), template="mistral_v3").get_vocab()
        assert vocabulary["<image>"] == RESERVED
        model = pieces(folder)
        names = {model.id_to_piece(index): index for index in range(model.get_piece_size())}
        assert names == vocabulary


def test_an_export_of_an_older_import_agrees_too(tmp_path: Path) -> None:
    """Its tokenizer.model still has the reserved entry's name."""
    run, origin = tmp_path / "run", tokenizer_folder(tmp_path / "origin")
    copy_tokenizer(origin, run)
    (run / "tokenizer.model").write_bytes((origin / "tokenizer.model").read_bytes())
    assert pieces(export(run, tmp_path / "out")).id_to_piece(RESERVED) == "<image>"


def test_another_model_s_pieces_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tokenizer_folder(tmp_path / "run", image=True)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((run / "tokenizer.model").read_bytes())
    model.pieces[300].piece = "elsewhere"
    (run / "tokenizer.model").write_bytes(model.SerializeToString())
    with caplog.at_level(logging.WARNING):
        assert not (export(run, tmp_path / "out") / "tokenizer.model").exists()
    assert "tokenizer.model is left out: it calls id 300 'elsewhere'" in caplog.text


def test_a_file_of_another_format_is_kept_as_it_is(tmp_path: Path) -> None:
    """Llama-3's tokenizer.model is a list of byte strings, without special tokens."""
    run = tokenizer_folder(tmp_path / "run", image=True)
    (run / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    copied = export(run, tmp_path / "out") / "tokenizer.model"
    assert copied.read_text() == "IQ== 0\nIg== 1\n"


def test_no_token_is_added_to_a_text(tmp_path: Path, exported: Path) -> None:
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("run", "out"))
    text = "[INST] <image>\nwhat is it ?[/INST] a red \u4e2d"
    assert before(text).input_ids == [1, *after(text).input_ids]
    assert after(text).input_ids == before(text, add_special_tokens=False).input_ids
    assert set(after(text)) == {"input_ids", "attention_mask"}
    chat = [{"role": "user", "content": "what is it ?"}]
    written = after.apply_chat_template(chat, tokenize=False)
    ids = after.apply_chat_template(chat, return_dict=False)
    assert after(written).input_ids == ids
    assert ids.count(after.bos_token_id) == 1


def test_the_offsets_of_byte_level_tokenizers_are_kept(tmp_path: Path) -> None:
    run = tokenizer_folder(tmp_path / "run", image=True)
    tokenizer = load_tokenizer(str(run), template="mistral_v3")
    byte_level = processors.ByteLevel(trim_offsets=True)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([byte_level, ADDING_BOS])
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, run, tmp_path / "out", pad_token="<unk>")
    left = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["post_processor"]
    assert [part["type"] for part in left["processors"]] == ["ByteLevel"]


def test_config_is_in_words_that_all_releases_read(exported: Path) -> None:
    config = json.loads((exported / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["[INST]", "[/INST]", "<image>"]
    assert "extra_special_tokens" not in config, "a dictionary in transformers 4, a list in 5"
    assert "add_prefix_space" not in config, "transformers 4 would rebuild the tokenizer"
    assert "chat_template" not in config, "it has a file of its own"
    assert (config["pad_token"], config["padding_side"]) == ("<unk>", "left")
    files = {path.name for path in exported.iterdir()}
    names = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"}
    assert files == names, "nothing is said twice"

"""`<image>` takes a reserved entry's place or a padded one; other tokens keep their ids."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_dattn.conversion.tokenizer import copy_tokenizer
from megatron_dattn.data.tokenizer import special_token_ids
from megatron_dattn.errors import CheckpointError


def save_tokenizer(folder, special):
    vocab = {token: n for n, token in enumerate([*special, "a", "b", "ab"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocab, merges=[("a", "b")], unk_token="<unk>")),
        unk_token="<unk>",
        additional_special_tokens=[token for token in special if token != "<unk>"],
    )
    tokenizer.save_pretrained(folder)


def test_control_8_is_renamed(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    save_tokenizer(source, ["<unk>", "[control_7]", "[control_8]"])
    image_id = copy_tokenizer(source, target)
    before, after = (AutoTokenizer.from_pretrained(path) for path in (source, target))
    assert image_id == before.convert_tokens_to_ids("[control_8]") == 2
    assert after.convert_tokens_to_ids("<image>") == 2
    assert len(after) == len(before)
    assert after("ab<image>a").input_ids == [5, 2, 3]
    assert "[control_8]" not in after.get_vocab()


def test_an_existing_image_token_is_kept(tmp_path):
    save_tokenizer(tmp_path / "source", ["<unk>", "[control_8]", "<image>"])
    assert copy_tokenizer(tmp_path / "source", tmp_path / "target") == 2


def test_lowest_reserved_entry_where_control_8_is_absent(tmp_path):
    save_tokenizer(tmp_path / "source", ["<unk>", "[control_3]", "[control_12]"])
    assert copy_tokenizer(tmp_path / "source", tmp_path / "target") == 1


def test_gemma_s_unused_entry_becomes_special(tmp_path):
    """Gemma lists `<unusedN>` among its added tokens, where they are not special."""
    source, target = tmp_path / "source", tmp_path / "target"
    save_tokenizer(source, ["<unk>", "<unused1>", "<unused0>", "<start_of_turn>"])
    for name, entries in (
        ("tokenizer.json", lambda content: content["added_tokens"]),
        ("tokenizer_config.json", lambda c: c.get("added_tokens_decoder", {}).values()),
    ):
        content = json.loads((source / name).read_text())
        for entry in entries(content):
            if entry["content"].startswith("<unused"):
                entry["special"] = False
        for key in ("additional_special_tokens", "extra_special_tokens"):
            if key in content:
                content[key] = ["<start_of_turn>"]
        (source / name).write_text(json.dumps(content))
    before = AutoTokenizer.from_pretrained(source)
    assert 1 not in special_token_ids(before)
    assert copy_tokenizer(source, target) == 1
    after = AutoTokenizer.from_pretrained(target)
    assert after.convert_tokens_to_ids("<image>") == 1
    assert 1 in special_token_ids(after)
    assert 2 not in special_token_ids(after)
    assert len(after) == len(before)


def test_a_padded_vocabulary_has_room_for_image(tmp_path):
    """Llama-2 and Vicuna reserve nothing; LLaVA's embedding has 64 rows more than entries."""
    source, target = tmp_path / "source", tmp_path / "target"
    save_tokenizer(source, ["<unk>", "<s>"])
    assert copy_tokenizer(source, target, vocab_size=6) == 5
    before, after = (AutoTokenizer.from_pretrained(path) for path in (source, target))
    assert after.convert_tokens_to_ids("<image>") == 5
    assert 5 in special_token_ids(after)
    assert after("ab<image>a").input_ids == [4, 5, 2]
    assert {**before.get_vocab(), "<image>": 5} == after.get_vocab()


def test_no_room_for_image_is_an_error_with_the_remedy(tmp_path):
    save_tokenizer(tmp_path / "source", ["<unk>"])
    for rows in (None, 4):
        with pytest.raises(CheckpointError, match=r"no reserved entry.* 4 rows .*n = 5"):
            copy_tokenizer(tmp_path / "source", tmp_path / "target", vocab_size=rows)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        copy_tokenizer(tmp_path / "empty", tmp_path / "target")

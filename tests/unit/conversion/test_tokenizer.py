"""`<image>` takes a reserved entry's place; ids, vocabulary size and other tokens stay."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_dattn.conversion.tokenizer import copy_tokenizer
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


def test_no_room_for_image_is_an_error(tmp_path):
    save_tokenizer(tmp_path / "source", ["<unk>"])
    with pytest.raises(CheckpointError, match="no reserved entry"):
        copy_tokenizer(tmp_path / "source", tmp_path / "target")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        copy_tokenizer(tmp_path / "empty", tmp_path / "target")

"""The tokenizer: Mistral v0.3's layout, round trips, offsets, agreement with sentencepiece."""

import itertools
import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from examples.quickstart.corpus import language_texts, sentences
from examples.quickstart.make_tokenizer import VOCAB_SIZE, make_tokenizer, train_sentencepiece
from megatron_dattn.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def test_ids_follow_mistral_v3(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4, "[control_8]": 10}
    for token, index in ids.items():
        assert tokenizer.convert_tokens_to_ids(token) == index
        assert index in tokenizer.all_special_ids
    assert tokenizer.is_fast
    assert len(tokenizer) == VOCAB_SIZE == max(tokenizer.get_vocab().values()) + 1
    assert tokenizer("4").input_ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2


def test_encodes_like_sentencepiece(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    foreign = ["Hello World!", "a  b   c", "xylophone 1234567890", "caf\u00e9 \u4e2d\u6587"]
    for text in itertools.chain(sentences(seed=9, grid=2, num_scenes=100), foreign):
        assert plain_ids(tokenizer, text) == reference.encode(text), text


@pytest.mark.parametrize(
    "text",
    ["top left: 3.", "two\nlines\n", "tabs\tand  two  spaces", "caf\u00e9 \u4e2d\u6587 \U0001f600"],
)
def test_round_trip_is_exact(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = plain_ids(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_round_trip_of_the_demo_language(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in itertools.islice(language_texts(seed=3, grid=3), 200):
        assert tokenizer.decode(plain_ids(tokenizer, text)) == text


def test_control_tokens_are_single_and_take_no_space(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "<s>[INST] [control_8]\nWhere is the 4?[/INST] top left</s>"
    tokens = tokenizer.convert_ids_to_tokens(plain_ids(tokenizer, text))
    assert tokens[:5] == ["<s>", "[INST]", "\u2581", "[control_8]", "<0x0A>"]
    assert tokens[-4:] == ["[/INST]", "\u2581top", "\u2581left", "</s>"]


def test_offsets_point_into_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "<s>[INST] Where is the 4?[/INST] top left and bottom right</s>"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    for token, (start, end) in zip(tokens, encoded.offset_mapping, strict=True):
        assert text[start:end] == token.replace("\u2581", " ")


def test_a_reserved_entry_can_become_the_image_token(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8").replace("[control_8]", "<image>")
        (tmp_path / name).write_text(text, encoding="utf-8")
    renamed = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(renamed) == VOCAB_SIZE
    assert renamed("<image>4", add_special_tokens=False).input_ids[0] == 10


def test_training_is_deterministic(folder: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    first, second = (json.loads((p / "tokenizer.json").read_text()) for p in (folder, tmp_path))
    assert first == second


def test_an_impossible_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="vocabulary of 100000 entries"):
        train_sentencepiece(seed=0, grid=2, vocab_size=100_000)

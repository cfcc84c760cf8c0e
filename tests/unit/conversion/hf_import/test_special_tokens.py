"""A tokenizer of another model is noticed by what config.json says about it."""

import json

import pytest

from megatron_dattn.conversion.hf_import.plan import plan_import, plan_whole_import
from megatron_dattn.conversion.hf_import.special_tokens import check_special_tokens, special_tokens
from megatron_dattn.errors import CheckpointError
from tests.unit.conversion.hf_models import save_language, save_vision
from tests.unit.conversion.llava_models import save_llava
from tests.unit.data.builders import make_tokenizer
from tests.unit.data.test_template_families import GEMMA, LLAMA3, VICUNA

MISTRAL = make_tokenizer()


def ids(tokenizer, *tokens):
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


# As published: Gemma's ids are in another order, chat Llamas name several ends or the other one.
@pytest.mark.parametrize(
    ("tokenizer", "bos", "ends"),
    [
        (MISTRAL, "<s>", ["</s>"]),
        (VICUNA, "<s>", ["</s>"]),
        (GEMMA, "<bos>", ["<eos>"]),
        (GEMMA, "<bos>", ["<eos>", "<end_of_turn>"]),
        (LLAMA3, "<|begin_of_text|>", ["<|end_of_text|>"]),
        (LLAMA3, "<|begin_of_text|>", ["<|end_of_text|>", "<|eot_id|>"]),
    ],
)
def test_published_pairs_pass(tmp_path, caplog, tokenizer, bos, ends):
    (first,), last = ids(tokenizer, bos), ids(tokenizer, *ends)
    for eos in (last, last[0]) if len(last) == 1 else (last,):
        named = special_tokens({"bos_token_id": first, "eos_token_id": eos})
        check_special_tokens(named, tokenizer, tmp_path)
    assert not caplog.messages


def test_tokens_that_the_tokenizer_lacks_are_an_error(tmp_path):
    llama3 = special_tokens({"bos_token_id": 128000, "eos_token_id": [128001, 128009]})
    with pytest.raises(
        CheckpointError, match=r"bos_token_id 128000, but .* no token 128000 \(its bos_token is 1\)"
    ):
        check_special_tokens(llama3, VICUNA, tmp_path)
    only_ends = {"eos": llama3["eos"]}
    with pytest.raises(CheckpointError, match=r"no token 128001, 128009 .* different models"):
        check_special_tokens(only_ends, VICUNA, tmp_path)


def test_another_end_token_is_a_warning(tmp_path, caplog):
    """A chat model whose tokenizer ends turns where its config ends texts."""
    (turn,) = ids(LLAMA3, "<|eot_id|>")
    check_special_tokens(special_tokens({"eos_token_id": turn}), LLAMA3, tmp_path)
    (warning,) = caplog.messages
    assert f"eos_token_id {turn} (<|eot_id|>), the tokenizer 2 (<|end_of_text|>)" in warning


def test_gemma_s_config_with_llama_s_tokenizer_is_a_warning(tmp_path, caplog):
    check_special_tokens(special_tokens({"bos_token_id": 2, "eos_token_id": 1}), VICUNA, tmp_path)
    assert len(caplog.messages) == 2


def test_what_is_not_said_contradicts_nothing(tmp_path, caplog):
    for config in ({}, {"bos_token_id": None, "eos_token_id": []}, {"bos_token_id": -1}):
        assert special_tokens(config) == {}
    section, whole = {"bos_token_id": 5}, {"bos_token_id": 6, "eos_token_id": 7}
    assert special_tokens(section, whole) == {"bos": (5,), "eos": (7,)}
    with pytest.raises(
        CheckpointError, match='has eos_token_id "2", but it must be a whole number'
    ):
        special_tokens({"eos_token_id": ["2"]})


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_imports_of_both_kinds_notice(tmp_path):
    save_vision(tmp_path / "vision")
    save_language(tmp_path / "language")
    plan_import(tmp_path / "vision", tmp_path / "language", tmp_path / "out")
    edit(tmp_path / "language", bos_token_id=60)
    with pytest.raises(CheckpointError, match=r"language: config\.json has bos_token_id 60"):
        plan_import(tmp_path / "vision", tmp_path / "language", tmp_path / "out")
    save_llava(tmp_path / "llava")
    plan_whole_import(tmp_path / "llava", tmp_path / "out")
    text = json.loads((tmp_path / "llava" / "config.json").read_text())["text_config"]
    edit(tmp_path / "llava", text_config=text | {"eos_token_id": 61})
    with pytest.raises(CheckpointError, match=r"llava: config\.json has eos_token_id 61"):
        plan_whole_import(tmp_path / "llava", tmp_path / "out")

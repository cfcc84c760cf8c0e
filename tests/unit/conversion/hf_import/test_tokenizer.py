"""`<image>` takes a reserved entry or a new one, and another model's tokenizer is noticed."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_dattn.conversion.hf_import.plan import plan_import, plan_whole_import
from megatron_dattn.conversion.hf_import.tokenizer import (
    check_special_tokens,
    copy_tokenizer,
    special_tokens,
)
from megatron_dattn.data.tokenizer import load_tokenizer, special_token_ids
from megatron_dattn.errors import CheckpointError, ConfigError
from tests.unit.conversion.hf_models import save_language, save_vision
from tests.unit.conversion.llava_models import save_llava
from tests.unit.data.builders import make_tokenizer
from tests.unit.data.test_template_families import GEMMA, LLAMA3, VICUNA

MISTRAL = make_tokenizer()


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


def test_image_is_added_where_nothing_is_reserved(tmp_path):
    """As in Llama-2, Vicuna, Qwen and SmolLM2."""
    source, target = tmp_path / "source", tmp_path / "target"
    save_tokenizer(source, ["<unk>", "<s>"])
    assert copy_tokenizer(source, target) == 5
    before, after = (AutoTokenizer.from_pretrained(path) for path in (source, target))
    assert after.convert_tokens_to_ids("<image>") == 5
    assert 5 in special_token_ids(after)
    assert after("ab<image>a").input_ids == [4, 5, 2]
    assert {**before.get_vocab(), "<image>": 5} == after.get_vocab()


def save_llama_tokenizer(folder, *, lists_added_tokens, special=("<unk>", "<s>", "</s>")):
    """Llama-2's and Vicuna's files, as transformers 4 wrote them, or as the hub's older ones."""
    folder.mkdir()
    vocab = {token: n for n, token in enumerate([*special, "a", "b", "ab", "\u2581"])}
    backend = Tokenizer(BPE(vocab, merges=[("a", "b")], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "legacy": False,
    }
    if lists_added_tokens:
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        config["added_tokens_decoder"] = {
            str(n): {"content": name, **flags, "special": True} for n, name in enumerate(special)
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("lists_added_tokens", [True, False])
@pytest.mark.parametrize(
    ("special", "image_id"),
    [(("<unk>", "<s>", "</s>"), 7), (("<unk>", "<s>", "</s>", "<image>"), 3)],
)
def test_both_styles_of_a_llama_tokenizer_get_image(
    tmp_path, lists_added_tokens, special, image_id
):
    source, target = tmp_path / "source", tmp_path / "target"
    save_llama_tokenizer(source, lists_added_tokens=lists_added_tokens, special=special)
    assert copy_tokenizer(source, target) == image_id
    after = load_tokenizer(str(target), template="plain", vocab_size=9)
    assert type(after).__name__.startswith("LlamaTokenizer")
    assert after.convert_tokens_to_ids("<image>") == image_id
    assert image_id in special_token_ids(after)
    assert image_id in after("ab<image>a").input_ids
    assert copy_tokenizer(target, tmp_path / "again") == image_id


def test_an_image_entry_that_the_list_of_added_tokens_lacks_is_listed(tmp_path):
    save_llama_tokenizer(tmp_path / "source", lists_added_tokens=True)
    path = tmp_path / "source" / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.add_special_tokens([AddedToken("<image>", normalized=False)])
    backend.save(str(path))
    assert copy_tokenizer(tmp_path / "source", tmp_path / "target") == 7
    assert load_tokenizer(str(tmp_path / "target"), template="plain")("<image>").input_ids[-1] == 7


def test_image_alone_may_lie_behind_the_embedding(tmp_path):
    save_llama_tokenizer(tmp_path / "source", lists_added_tokens=False)
    assert copy_tokenizer(tmp_path / "source", tmp_path / "target") == 7
    load_tokenizer(str(tmp_path / "target"), template="plain", vocab_size=7)
    with pytest.raises(ConfigError, match=r"has ids up to 6, but the model's vocab_size is 6"):
        load_tokenizer(str(tmp_path / "target"), template="plain", vocab_size=6)


def test_a_begin_token_that_only_the_model_names_is_the_tokenizer_s(tmp_path):
    """Qwen's tokenizers begin a text with none, and their config.json names one."""
    source = tmp_path / "source"
    save_llama_tokenizer(source, lists_added_tokens=True)
    path = source / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings | {"bos_token": None, "add_bos_token": False}))
    copy_tokenizer(source, tmp_path / "without")
    assert load_tokenizer(str(tmp_path / "without"), template="model").bos_token is None
    copy_tokenizer(source, tmp_path / "named", begin=2)
    assert load_tokenizer(str(tmp_path / "named"), template="plain").bos_token == "</s>"
    path.write_text(json.dumps(settings))
    copy_tokenizer(source, tmp_path / "own", begin=2)
    assert load_tokenizer(str(tmp_path / "own"), template="plain").bos_token == "<s>"


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        copy_tokenizer(tmp_path / "empty", tmp_path / "target")


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

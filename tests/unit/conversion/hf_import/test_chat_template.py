"""Which template an import is asked in, and its `<image>`, for every family of language models."""

import json
import re

import pytest
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_dattn.conversion.hf_import.chat_template import choose_template
from megatron_dattn.conversion.hf_import.plan import plan_import
from megatron_dattn.conversion.hf_import.run import write_import
from megatron_dattn.conversion.io.tokenizer_files import chat_template
from megatron_dattn.data.templates import TEMPLATES, read_template
from megatron_dattn.errors import CheckpointError
from tests.unit.conversion.hf_models import (
    LANGUAGE_SIZES,
    SPECIAL_TOKENS,
    save_language,
    save_tokenizer,
    save_vision,
)
from tests.unit.data import test_model_template as model_templates
from tests.unit.data.builders import make_tokenizer
from tests.unit.data.test_template_families import GEMMA, LLAMA3, VICUNA

MISTRAL = make_tokenizer()


@pytest.mark.parametrize(
    ("tokenizer", "family", "template"),
    [
        (MISTRAL, "mistral", "mistral_v3"),
        (VICUNA, "mistral", "mistral_v1"),  # before v0.3 Mistral's tokenizer has no [INST]
        (LLAMA3, "llama", "llama3"),
        (VICUNA, "llama", "vicuna_v1"),
        (GEMMA, "gemma2", "gemma"),
        (VICUNA, "gemma2", "plain"),
        (VICUNA, "qwen2", "plain"),
    ],
)
def test_the_family_s_template_if_the_tokenizer_can_write_it(tmp_path, tokenizer, family, template):
    assert choose_template(tmp_path, tokenizer, family).name == template


def test_an_export_says_its_template(tmp_path):
    file = tmp_path / "chat_template.jinja"
    file.write_text(read_template("vicuna_v1"), encoding="utf-8")
    assert choose_template(tmp_path, MISTRAL, "mistral") == ("vicuna_v1", "the export's own")
    file.write_text("{{ messages }}", encoding="utf-8")
    assert choose_template(tmp_path, MISTRAL, "mistral").name == "mistral_v3"


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_older_export_says_its_template(tmp_path, name):
    """Its comments had other words."""
    exported = chat_template(name)
    old = exported.replace("As training reads records:", "As training reads rows:")
    old = re.sub(
        r"\{#-.*?-#\}", "{#- Said otherwise, over\n    two lines. -#}", old, count=1, flags=re.S
    )
    assert old != exported
    (tmp_path / "chat_template.jinja").write_text(old, encoding="utf-8")
    assert choose_template(tmp_path, MISTRAL, "mistral") == (name, "the export's own")
    # What is rendered counts: a word of it makes another template.
    other = exported.replace("raise_exception('", "raise_exception('No: ", 1)
    (tmp_path / "chat_template.jinja").write_text(other, encoding="utf-8")
    assert choose_template(tmp_path, MISTRAL, "mistral").reason != "the export's own"


def test_a_template_that_came_with_the_model(tmp_path, caplog):
    tokenizer = model_templates.TOKENIZERS["smollm2"]
    choice = choose_template(tmp_path, tokenizer, "llama")
    assert choice == ("model", "the chat template that came with its tokenizer")
    # An export of it comes back as what it was, and is exported anew as it is.
    exported = chat_template("model", tokenizer.chat_template)
    (tmp_path / "chat_template.jinja").write_text(exported, encoding="utf-8")
    again = model_templates.family_tokenizer(["<|im_start|>", "<|im_end|>"], exported)
    assert choose_template(tmp_path, again, "llama") == choice
    assert chat_template("model", again.chat_template) == exported
    assert not caplog.records


def test_a_model_s_template_that_training_cannot_use_is_told(tmp_path, caplog):
    endless = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = model_templates.family_tokenizer(["<s>", "</s>", "[INST]", "[/INST]"], endless)
    assert choose_template(tmp_path, tokenizer, "mistral").name == "mistral_v3"
    assert "is not used: data.template is 'model', but" in caplog.text
    assert "it would never stop" in caplog.text


@pytest.mark.parametrize(
    ("family", "guess"),
    [
        ("llama", r"vicuna_v1, a guess .* family llama: .* lacks <\|start_header_id\|>"),
        ("mistral", r"mistral_v1, a guess .* lacks \[INST\], \[/INST\]; if it"),
        ("gemma2", r"plain, a guess .* lacks <start_of_turn>.* questions themselves are not shown"),
        ("qwen3", r"plain, a guess .* family qwen3: its tokenizer lacks a chat template;"),
    ],
)
def test_a_guess_is_not_silent(tmp_path, caplog, family, guess):
    choose_template(tmp_path, VICUNA, family)
    (warning,) = caplog.messages
    assert re.search(guess, warning)
    caplog.clear()
    choose_template(tmp_path, LLAMA3, "llama")
    assert not caplog.messages


TEKKEN = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "<SPECIAL_12>"]


def test_a_tekken_tokenizer_s_spaces_are_a_guess(tmp_path, caplog):
    nemo = make_tokenizer([*TEKKEN[:-1], "<image>", "<SPECIAL_13>"])
    choice = choose_template(tmp_path, nemo, "mistral")
    assert choice.name == "mistral_v3"
    (warning,) = caplog.messages
    assert re.search(
        r"mistral_v3, a guess .*Tekken .*without the spaces.* set data\.template", warning
    )
    caplog.clear()
    export = tmp_path / "chat_template.jinja"
    export.write_text(read_template("mistral_v3"), encoding="utf-8")
    assert choose_template(tmp_path, nemo, "mistral").reason == "the export's own"
    assert not caplog.messages


def test_a_nemo_is_imported_with_a_reserved_entry_as_image(tmp_path, caplog):
    save_vision(tmp_path / "vision")
    save_language(tmp_path / "language")
    save_tokenizer(tmp_path / "language", [*TEKKEN, "<SPECIAL_13>", "<SPECIAL_10>"])
    plan = plan_import(tmp_path / "vision", tmp_path / "language", tmp_path / "run")
    assert "conversations are written as mistral_v3: a guess" in plan.summary()
    assert "Tekken" in caplog.text
    write_import(plan)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    assert tokenizer.convert_tokens_to_ids("<image>") == len(TEKKEN) - 1, "the lowest id"
    assert "<SPECIAL_12>" not in tokenizer.get_vocab()


@pytest.fixture
def llama(tmp_path):
    """A Llama with 64 rows in its embedding, whose tokenizer reserves nothing."""
    save_vision(tmp_path / "vision")
    sizes = {name: size for name, size in LANGUAGE_SIZES.items() if name != "sliding_window"}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "llama")
    return tmp_path


def test_a_padded_llama_is_imported_with_image_behind_its_tokens(llama):
    save_tokenizer(llama / "llama", SPECIAL_TOKENS[:3])
    plan = plan_import(llama / "vision", llama / "llama", llama / "run")
    assert "conversations are written as vicuna_v1: a guess" in plan.summary()
    write_import(plan)
    config = yaml.safe_load((llama / "run" / "config.yaml").read_text())
    assert config["data"]["template"] == "vicuna_v1"
    assert config["model"]["language"]["vocab_size"] == 64
    tokens = json.loads((llama / "run" / "tokenizer" / "tokenizer.json").read_text())
    (entry,) = (token for token in tokens["added_tokens"] if token["content"] == "<image>")
    assert entry["id"] == 3 + 31  # special tokens and letters
    assert entry["special"]


@pytest.mark.parametrize("entries", [64, 65])
def test_a_full_llama_has_image_behind_its_vocabulary(llama, entries):
    names = (f"<{n}>" for n in range(entries - 34))
    save_tokenizer(llama / "llama", [*SPECIAL_TOKENS[:3], *names])
    if entries > 64:  # `<image>` alone may lie there
        with pytest.raises(CheckpointError, match="has ids up to 64, but the model's vocab_size"):
            plan_import(llama / "vision", llama / "llama", llama / "run")
        return
    plan = plan_import(llama / "vision", llama / "llama", llama / "run")
    assert plan.image_token_id == 64
    assert "<image> has id 64, behind the vocabulary of 64: it is never embedded" in plan.summary()

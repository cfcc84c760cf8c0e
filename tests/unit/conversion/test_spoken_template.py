"""Which template an import is asked in, and its `<image>`, for every family of language models."""

import json

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_dattn.conversion.import_hf import import_checkpoint
from megatron_dattn.conversion.spoken_template import spoken_template
from megatron_dattn.data.templates import read_template
from megatron_dattn.errors import CheckpointError
from tests.unit.conversion.hf_models import (
    LANGUAGE_SIZES,
    SPECIAL_TOKENS,
    save_tokenizer,
    save_vision,
)
from tests.unit.data.builders import make_tokenizer
from tests.unit.data.test_template_families import GEMMA, LLAMA3, VICUNA

MISTRAL = make_tokenizer()


@pytest.mark.parametrize(
    ("tokenizer", "family", "template"),
    [
        (MISTRAL, "mistral", "mistral_v3"),
        (VICUNA, "mistral", "plain"),  # before v0.3 Mistral's tokenizer has no [INST]
        (LLAMA3, "llama", "llama3"),
        (VICUNA, "llama", "vicuna_v1"),
        (GEMMA, "gemma2", "gemma"),
        (VICUNA, "gemma2", "plain"),
    ],
)
def test_the_family_s_template_if_the_tokenizer_can_write_it(tmp_path, tokenizer, family, template):
    assert spoken_template(tmp_path, tokenizer, family) == template


def test_an_export_says_its_template(tmp_path):
    file = tmp_path / "chat_template.jinja"
    file.write_text(read_template("vicuna_v1"), encoding="utf-8")
    assert spoken_template(tmp_path, MISTRAL, "mistral") == "vicuna_v1"
    file.write_text("{{ messages }}", encoding="utf-8")
    assert spoken_template(tmp_path, MISTRAL, "mistral") == "mistral_v3"


@pytest.fixture
def llama(tmp_path):
    """A Llama with 64 rows in its embedding, whose tokenizer reserves nothing."""
    save_vision(tmp_path / "vision")
    sizes = {name: size for name, size in LANGUAGE_SIZES.items() if name != "sliding_window"}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "llama")
    return tmp_path


def test_a_padded_llama_is_imported_with_image_behind_its_tokens(llama):
    save_tokenizer(llama / "llama", SPECIAL_TOKENS[:3])
    import_checkpoint(llama / "vision", llama / "llama", llama / "run")
    config = yaml.safe_load((llama / "run" / "config.yaml").read_text())
    assert config["data"]["template"] == "vicuna_v1"
    assert config["model"]["language"]["vocab_size"] == 64
    tokens = json.loads((llama / "run" / "tokenizer" / "tokenizer.json").read_text())
    (entry,) = (token for token in tokens["added_tokens"] if token["content"] == "<image>")
    assert entry["id"] == 3 + 31  # special tokens and letters
    assert entry["special"]


def test_a_full_llama_is_refused_with_the_remedy(llama):
    save_tokenizer(llama / "llama", [*SPECIAL_TOKENS[:3], *(f"<{n}>" for n in range(30))])
    with pytest.raises(CheckpointError, match=r"resize_token_embeddings.* with n = 65"):
        import_checkpoint(llama / "vision", llama / "llama", llama / "run")
    assert not (llama / "run").exists()

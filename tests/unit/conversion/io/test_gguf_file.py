"""GGUF files come in as the model that they were written of, and what would get lost is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_dattn.conversion.io import gguf_file
from megatron_dattn.conversion.io.gguf_file import has_gguf, unpacked
from megatron_dattn.errors import CheckpointError
from tests.unit.conversion.hf_models import save_language, save_vision
from tools.convert_checkpoint import main

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

# The last one is Gemma's, which its class asks for.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<mask>"]
VOCABULARY = [*SPECIAL, *sorted(bytes_to_unicode().values()), "th", "the"]
CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] \
+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
{% endif %}"""
SIZES = {"vocab_size": len(VOCABULARY), "hidden_size": 64, "head_dim": 16}
# Of whole tensors, then of those in a layer: llama.cpp's names by Hugging Face's.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA2_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, family: str) -> str:
    whole, _, kind = name.rpartition(".")
    names = {**NAMES, **(GEMMA2_NORMS if family == "gemma2" else {})}
    if whole in names:
        return f"{names[whole]}.{kind}"
    _, _, layer, inner = whole.split(".", 3)
    return f"blk.{layer}.{names[inner]}.{kind}"


def as_llama_cpp(name: str, values: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """It keeps the two halves of Llama's rotated heads in turn, and Gemma's norms from one."""
    config = model.config
    if config.model_type == "gemma2" and name.endswith("norm.weight"):
        return values + 1
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for kind, count in heads.items():
        if config.model_type == "llama" and f".{kind}_proj." in name:
            return values.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
    return values


def write_gguf(
    path: Path, model: PreTrainedModel, more: dict[str, torch.Tensor], **fields: Any
) -> None:
    """The file of a model, with Q8_0 in the embedding and the FFN, where the model is rounded, too.

    Args:
        more: tensors that the model does not have.
        fields: of the architecture, by names with `__` in place of dots.
    """
    config, kind = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    for name, value in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{kind}.{name.replace('__', '.')}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    special, usual = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([special if token in SPECIAL else usual for token in VOCABULARY])
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML)
    tensors = {**dict(model.named_parameters()), **more}
    for name, values in tensors.items():
        theirs = name if name in more else gguf_name(name, kind)
        array = as_llama_cpp(name, values.detach(), model).contiguous().numpy()
        quantized = "embed" in name or "mlp" in name
        dtype = gguf.GGMLQuantizationType.Q8_0 if quantized else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(array, dtype)
        writer.add_tensor(theirs, stored, raw_dtype=dtype)
        if quantized:
            values.data.copy_(torch.from_numpy(gguf.quants.dequantize(stored, dtype)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_gguf(
    path: Path,
    family: str,
    more: dict[str, torch.Tensor] | None = None,
    fields: dict[str, Any] | None = None,
    **changes: Any,
) -> PreTrainedModel:
    """A file, and the model that it was written of."""
    model = save_language(path.with_suffix(""), family=family, varied=True, **SIZES, **changes)
    write_gguf(path, model, more or {}, **(fields or {}))
    return model


def tokenizer() -> Tokenizer:
    backend = Tokenizer(BPE({t: n for n, t in enumerate(VOCABULARY)}, [("t", "h"), ("th", "e")]))
    backend.add_special_tokens(SPECIAL)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 4096},
}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_the_model_that_it_was_written_of(tmp_path, family, capsys):
    path = tmp_path / "tiny.gguf"
    fields = {**CAPS, "attention__sliding_window": 4096} if family == "gemma2" else {}
    theirs = save_gguf(path, family, fields=fields, **FAMILIES[family])
    text = "the <|im_start|>other\n 12"
    with unpacked(path) as folder, torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        words = AutoTokenizer.from_pretrained(folder)
        ids = torch.tensor([tokenizer().encode(text).ids])
        assert words(text, add_special_tokens=False).input_ids == ids[0].tolist()
        assert words.decode(ids[0]) == text
        assert (words.bos_token_id, words.eos_token_id) == (1, 2)
        # Gemma-2's norms are stored as 1 + w.
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
        assert model.config.head_dim == 16
    assert not folder.exists()
    save_vision(tmp_path / "vision")
    inputs = ["--vision", str(tmp_path / "vision"), "--language", str(path)]
    assert main(["import", *inputs, "--output", str(tmp_path / "base")]) == 0
    said = capsys.readouterr().out
    assert f"<image> has id {len(VOCABULARY)}, behind the vocabulary of {len(VOCABULARY)}" in said
    assert "written as model: the chat template that came with its tokenizer" in said
    assert main(["verify", str(tmp_path / "base")]) == 0
    assert capsys.readouterr().out.count(": agree") == 2
    manifest = json.loads((tmp_path / "base" / "step-0000000" / "manifest.json").read_text())
    assert manifest["facts"]["sources"]["language_model"] == str(path)


EXTRA = {"rope_freqs.weight": torch.ones(8)}
BIAS = {"blk.0.attn_q.bias": torch.ones(64)}


@pytest.mark.parametrize(
    ("more", "fields", "message"),
    [
        (EXTRA, {}, r"has rope_freqs\.weight, which transformers passes over"),
        (BIAS, {}, r"has blk\.0\.attn_q\.bias, which"),
        ({}, {"rope__scaling__type": "yarn"}, r"has rope\.scaling\.type yarn, which"),
        ({}, {"expert_count": 8}, r"has expert_count 8, which"),
    ],
)
def test_what_would_get_lost_is_refused_by_name(tmp_path, more, fields, message):
    save_gguf(tmp_path / "tiny.gguf", "llama", more, fields)
    with pytest.raises(CheckpointError, match=message), unpacked(tmp_path / "tiny.gguf"):
        pass


def test_a_tensor_that_is_not_there_is_not_drawn_at_random(tmp_path, monkeypatch):
    parameters = PreTrainedModel.named_parameters

    def without_one(self: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
        return [each for each in parameters(self) if "layers.1.mlp.up" not in each[0]]

    model = save_language(tmp_path / "tiny", family="llama", **SIZES)
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "named_parameters", without_one)
        write_gguf(tmp_path / "tiny.gguf", model, {})
    missing = r"tiny\.gguf lacks model\.layers\.1\.mlp\.up_proj\.weight"
    with pytest.raises(CheckpointError, match=missing), unpacked(tmp_path / "tiny.gguf"):
        pass


def test_other_files_are_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="of architecture 'mamba'; supported: llama, qwen2"):
        unpacked(path).__enter__()
    path.write_bytes(b"GGUF and nothing else")
    with pytest.raises(CheckpointError, match=r"tiny\.gguf cannot be read by transformers"):
        unpacked(path).__enter__()
    save_vision(tmp_path / "vision")
    inputs = ["import", "--vision", str(tmp_path / "vision"), "--output", str(tmp_path / "base")]
    assert main([*inputs, "--language", str(tmp_path / "other.gguf")]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert main([*inputs, "--language", str(tmp_path)]) == 2
    assert "name the file itself: --language MODEL.gguf" in capsys.readouterr().err
    monkeypatch.setattr(gguf_file, "_PACKAGES", ("gguf", "package_that_nobody_has"))
    assert not has_gguf()
    assert main([*inputs, "--language", str(path)]) == 2
    assert "pip install 'megatron_dattn[gguf]'" in capsys.readouterr().err

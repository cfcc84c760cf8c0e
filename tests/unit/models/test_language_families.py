"""Every language family equals Hugging Face's model, also with texts longer than a window."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from megatron_dattn.attention.rotary_scaling import RotaryScaling
from megatron_dattn.batch import PackedBatch
from megatron_dattn.models.config import LanguageConfig
from tests.support.vlm import load_hugging_face, make_batch, tiny_model, tiny_model_config

pytestmark = pytest.mark.usefixtures("one_process")

_CLASSES = {
    "mistral": (MistralConfig, MistralForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
}
# `max_position_embeddings` changes nothing here, and None is not Hugging Face's word for it.
_OWN_NAMES = (
    *("family", "rope_theta", "rope_scaling", "hidden_activation", "max_position_embeddings"),
)
# Of the tiny model's eight pairs of channels one keeps its frequency, one gets part of it, and the
# others are slowed down; texts are longer than the length that is said to have been trained on.
LLAMA3 = RotaryScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)


def long_batch() -> PackedBatch:
    return make_batch([9, 1, 150], budgets=(0, 160))


def hugging_face(language: LanguageConfig) -> PreTrainedModel:
    """Hugging Face's model with random weights, in which every norm and bias matters."""
    fields = {n: v for n, v in vars(language).items() if n not in _OWN_NAMES}
    scaling = language.rope_scaling
    rope = (
        {"rope_type": "default"} if scaling is None else {"rope_type": "llama3", **asdict(scaling)}
    )
    fields |= {
        "rope_parameters": {"rope_theta": language.rope_theta, **rope},
        "initializer_range": 0.2,  # larger than usual, so that attention is not almost uniform
    }
    activation = "hidden_activation" if language.family == "gemma2" else "hidden_act"
    fields[activation] = language.hidden_activation
    config_class, model_class = _CLASSES[language.family]
    torch.manual_seed(11)
    model = model_class(config_class(**fields, attn_implementation="eager"))
    with torch.no_grad():  # norms start at one, or at zero, and biases at zero: let them matter
        for name, param in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                param.add_(torch.randn_like(param) * 0.3)
    return model.eval()


def _logits(language: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """(ours, theirs) per sample; without images every preset is the language model itself."""
    config = tiny_model_config(num_hidden_layers=3, **language)
    ours, theirs = tiny_model(config).to(dtype), hugging_face(config.language).to(dtype)
    load_hugging_face(ours, text=theirs.state_dict())
    batch = make_batch([9, 1, 14]) if language.get("rope_scaling") is None else long_batch()
    pairs = []
    for sample in range(3):
        start, end = batch.layout.text_tokens(sample)
        budget = batch.layout.visual_budget
        with torch.no_grad():
            logits = ours.forward_logits(batch, torch.arange(start, end))
            expected = theirs(batch.input_ids[None, start - budget : end - budget]).logits[0]
        pairs.append([logits, expected])
    return pairs


@pytest.mark.parametrize(
    "language",
    [
        {"family": "mistral"},
        {"family": "mistral", "sliding_window": 4},  # v0.1: in every layer
        {"family": "llama"},
        {"family": "llama", "rope_scaling": LLAMA3},
        {"family": "llama", "vocab_size": 67, "tie_word_embeddings": True},  # padded
        {"family": "qwen2"},
        {"family": "qwen2", "tie_word_embeddings": True},
        {"family": "qwen3"},
        {"family": "qwen3", "tie_word_embeddings": True},
        {"family": "gemma2"},
        {"family": "gemma2", "tie_word_embeddings": True},
        {"family": "gemma2", "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ],
    ids=str,
)
def test_logits_equal_hugging_face(language):
    for logits, expected in _logits(language):
        assert logits.shape == expected.shape
        # fp32 sums in another order, through three layers.
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def follow_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs takes norms and softmax in fp32 whatever the dtype; let it compute in the tokens'."""

    def llama_norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    def gemma2_norm(self: Any, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * (1 + self.weight)

    def softmax(scores: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        return scores.softmax(dim)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", llama_norm)
    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", llama_norm)
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", llama_norm)
    monkeypatch.setattr(modeling_gemma2.Gemma2RMSNorm, "forward", gemma2_norm)
    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)


@pytest.mark.parametrize(
    "language",
    [
        {"family": "gemma2"},
        {"family": "llama", "rope_scaling": LLAMA3},
        {"family": "llama", "tie_word_embeddings": True},
        {"family": "qwen2", "tie_word_embeddings": True},
        {"family": "qwen3", "tie_word_embeddings": True},
    ],
    ids=str,
)
def test_logits_equal_hugging_face_in_float64(monkeypatch, language):
    """Angles are float32 on both sides, by the same operations."""
    follow_the_dtype(monkeypatch)
    for logits, expected in _logits(language, torch.float64):
        # Some thousand float64 roundings.
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_all_three_kinds_of_frequencies_are_compared():
    """And each of them changes the logits, so that the comparison above would notice a mistake."""
    config = tiny_model_config(family="llama").language
    plain = 1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    share = LLAMA3.scale(plain) / plain
    assert share[0] == 1
    assert 1 / 8 < share[1] < 1
    assert share[2:].tolist() == pytest.approx([1 / 8] * 6)
    batch = long_batch()
    tokens = torch.arange(*batch.layout.text_tokens(2))
    changes = [{}, {"low_freq_factor": 1.2}, {"high_freq_factor": 6.0}, {"factor": 4.0}]
    with torch.no_grad():
        plain, scaled, *others = (
            tiny_model(tiny_model_config(family="llama", rope_scaling=scaling)).forward_logits(
                batch, tokens
            )
            for scaling in (None, *(replace(LLAMA3, **change) for change in changes))
        )
    for other in (plain, *others):
        assert (scaled - other).abs().max() > 1e-4


@pytest.mark.parametrize(
    "changed",
    [
        {"sliding_window": None},
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
        {"query_pre_attn_scalar": None},
        {"hidden_activation": "silu"},
    ],
    ids=str,
)
def test_every_setting_of_gemma2_matters(changed):
    """So the comparison above would notice if one were ignored."""
    batch = make_batch([14])
    tokens = torch.arange(batch.layout.visual_budget, batch.layout.visual_budget + 14)
    with torch.no_grad():
        plain, other = (
            tiny_model(tiny_model_config(family="gemma2", **fields)).forward_logits(batch, tokens)
            for fields in ({}, changed)
        )
    assert (plain - other).abs().max() > 1e-4


def test_padding_of_the_vocabulary_neither_counts_nor_learns():
    config = tiny_model_config(vocab_size=61)
    assert config.language.padded_vocab_size == 64
    model, batch = tiny_model(config), make_batch([9, 5], [(2,)])
    batch.input_ids.clamp_(max=60)
    labelled = batch.labels != -100
    batch.labels[labelled] = batch.labels[labelled].clamp(max=60)
    losses = model(batch)
    tokens = labelled.nonzero().squeeze(1) + batch.layout.visual_budget
    logits = model.forward_logits(batch, tokens)
    assert logits.shape[1] == 61
    expected = torch.nn.functional.cross_entropy(logits, batch.labels[labelled], reduction="none")
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    language = model.language_model
    for weight in (language.output_layer.weight, language.embedding.word_embeddings.weight):
        assert torch.isfinite(weight.grad).all()
        assert not weight.grad[61:].any()
        assert weight.grad[:61].any()

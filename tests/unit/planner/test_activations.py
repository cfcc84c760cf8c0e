"""Activation bytes against sums done by hand, and what autograd keeps for the real model."""

import dataclasses
from typing import Any

import pytest
import torch

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExactSavings, ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from tests.support.distributed import run_distributed
from tests.support.megatron import init_model_parallel
from tests.support.planner import PACK, TINY, memory_of


def _saved_bytes(execution: ExecutionConfig) -> int:
    """One rank: what TINY keeps."""
    init_model_parallel()
    return _bytes_kept_by(TINY, execution)


def _bytes_kept_by(config: ModelConfig, execution: ExecutionConfig) -> int:
    """Bytes that autograd keeps between forward and backward, parameters excluded."""
    from megatron_dattn.batch import PackedBatch
    from megatron_dattn.models.build import build_model

    model = build_model(config, ParallelConfig(), execution)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    images = tuple(ImageSpan(sample, 0, config.image_grid) for sample in range(4))
    layout = TokenLayout((8,) * 4, images, 4 * config.tokens_per_image, 32, prompt_lengths=(1,) * 4)
    batch = PackedBatch(
        layout=layout,
        input_ids=torch.zeros(32, dtype=torch.int64),
        labels=torch.ones(32, dtype=torch.int64),
        pixel_values=torch.randn(4, 3, 28, 28),
        sample_keys=[str(sample) for sample in range(4)],
    )
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(batch)
    assert losses.shape == (32,)
    # Now, when what will be recomputed is freed.
    return sum(storage.nbytes() for storage in kept.values())


NAIVE = ExactSavings(visual_queries=False, folded_output=False, unread_tokens=False)


@pytest.mark.parametrize(
    ("recompute", "savings"),
    [
        ("none", NAIVE),
        ("none", ExactSavings()),
        ("none", ExactSavings(ffn_chunk_tokens=16)),
        ("selective", ExactSavings()),
        ("full", ExactSavings()),
    ],
)
def test_activations_are_near_what_autograd_keeps(recompute: str, savings: ExactSavings) -> None:
    """The estimate is for fused norms and SwiGLU, which this test's local modules are not on a CPU.

    Per token of a decoder layer (d 64, q 64, e 32, f 96) they keep 6d + 3q + 2e + 4f values where
    fused ones keep 4d + 2q + 2e + 3f: 736 / 1024 = 0.72. Under full recomputation neither keeps
    them. Of the three tensors of logits one is kept.
    """
    execution = ExecutionConfig(
        precision="fp32", recompute=recompute, attention_backend="math", savings=savings
    )
    (kept,) = run_distributed(_saved_bytes, 1, execution)
    memory = memory_of(execution=execution)
    logits = PACK.text_tokens * TINY.language.padded_vocab_size * 4
    pixels = 4 * 3 * 28 * 28 * 4  # the batch's, not autograd's
    estimate = memory.decoder + memory.vision - pixels + memory.head - 2 * logits
    assert 0.65 * kept < estimate < 1.1 * kept


def _bytes_kept_by_ffn_width() -> dict[str, list[int]]:
    """Per preset: with an FFN of 96 and of 192, each without and with chunks."""
    init_model_parallel()
    kept: dict[str, list[int]] = {}
    for attention in PRESETS:
        for width in (96, 192):
            language = dataclasses.replace(TINY.language, intermediate_size=width)
            config = dataclasses.replace(TINY, language=language, attention=attention)
            for tokens in (0, 8):
                savings = ExactSavings(ffn_chunk_tokens=tokens)
                execution = ExecutionConfig("fp32", attention_backend="math", savings=savings)
                kept.setdefault(attention, []).append(_bytes_kept_by(config, execution))
    return kept


def test_chunks_keep_nothing_of_any_ffn() -> None:
    """A wider FFN keeps more activations, for visual tokens that pass a share of it as well: with
    32 text tokens alone, it would be 3 values of 96 more columns in 4 layers. With chunks it does
    not.
    """
    (kept,) = run_distributed(_bytes_kept_by_ffn_width, 1)
    for attention, (narrow, narrow_chunked, wide, wide_chunked) in kept.items():
        assert wide - narrow >= 4 * 32 * 3 * 96 * 4, attention
        assert wide_chunked == narrow_chunked, attention


def test_every_norm_of_the_adapter_keeps_what_it_reads() -> None:
    """BF16, 4 images of 16 patches: the encoder's tokens of width 32, the language model's of
    64."""

    def kept(attention: str = "dattn", **adapter: Any) -> int:
        settings = dataclasses.replace(TINY.adapter, **adapter)
        config = dataclasses.replace(TINY, attention=attention, adapter=settings)
        return memory_of(config, trained=frozenset({"adapter"})).vision

    without = kept(norm="none")
    assert kept(norm="before") - without == 4 * 16 * 2 * 32
    assert kept(norm="behind") - without == 4 * 16 * 2 * 64
    assert kept(norm="both") - without == 4 * 16 * 2 * (32 + 64)
    assert kept("vidi") - without == 4 * 16 * 2 * (64 + 64)


def test_the_adapter_keeps_what_enters_the_decoder() -> None:
    """BF16, a frozen encoder of width 32; MLP and language model of width 64; 4 images."""
    pixels, patches = 4 * 3 * 28 * 28 * 4, 16
    per_token = 2 * (2 * 32 + 2 * 64 + 64)
    for attention, tokens, bytes_per_token in (
        ("s_attn", patches, per_token),
        ("fastervlm", patches // 4, per_token),
        ("saisa", patches, 2 * 64),  # features, padded
    ):
        config = dataclasses.replace(TINY, attention=attention)
        kept = memory_of(config, trained=frozenset({"adapter"})).vision - pixels
        assert kept == 4 * tokens * bytes_per_token, attention


def test_decoder_bytes_by_hand() -> None:
    """BF16 dattn, 64 + 32 tokens: d 64, q 64, e 32, f 96, 4 heads; 4 layers.

    The last one makes keys and values of visual tokens, which go no further.
    """
    per_token = 2 * (4 * 64 + 2 * 32 + 3 * 96)
    per_text_token = 2 * (2 * 64) + 4 * 4  # query and output; log-sum-exps
    folded_weight = 2 * 64 * 32
    layer = 96 * per_token + 32 * per_text_token + folded_weight
    last = 64 * 2 * (64 + 2 * 32) + 32 * (per_token + per_text_token)
    entering = 96 * 2 * 64
    assert memory_of().decoder == entering + 3 * layer + last
    # The last layer: gradients of text tokens' output and FFN product, and of the second weight.
    assert memory_of().at_work == 32 * 2 * (64 + 96) + 2 * 64 * 96
    # Without savings all tokens have a query and an output, the product of queries, keys and values
    # is kept whole, and values are repeated for the common projection.
    naive = memory_of(execution=ExecutionConfig(savings=NAIVE))
    of_text = 32 * (2 * 64 + 4 * 4)
    assert naive.decoder == entering + 4 * (96 * (per_token + 2 * 3 * 64) + of_text)


def test_recomputation_and_sequence_parallelism_save_activations() -> None:
    def decoder(recompute: str = "none", **parallel: bool | int) -> int:
        execution = ExecutionConfig(recompute=recompute)
        return memory_of(parallel=ParallelConfig(**parallel), execution=execution).decoder

    assert decoder("full") < decoder("selective") < decoder()
    tensor = decoder(tensor_model_parallel_size=2)
    sequence = decoder(tensor_model_parallel_size=2, sequence_parallel=True)
    assert decoder() / 2 == sequence < tensor < decoder()

"""Bytes per rank against sums done by hand.

Activation bytes are compared with what autograd keeps for the real model, totals with what a
device's allocator handed out for the 7B recipe.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.config.cli import parse_command_line
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExactSavings, ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.planner.memory import PackSize, RankMemory, rank_memory
from megatron_dattn.planner.parameters import count_parameters
from megatron_dattn.training.run_plan import make_plan
from tests.support.distributed import run_distributed
from tests.support.megatron import init_model_parallel
from tests.support.vlm import even_model_config

ROOT = Path(__file__).resolve().parents[3]
ALL = frozenset({"vision_model", "adapter", "language_model"})
TINY = even_model_config()
PACK = PackSize(visual_tokens=64, text_tokens=32, images=4)


def memory_of(
    config: ModelConfig = TINY,
    parallel: ParallelConfig | None = None,
    execution: ExecutionConfig | None = None,
    trained: frozenset[str] = ALL,
    data_parallel_size: int = 1,
    num_microbatches: int = 4,
    stage: int = 0,
) -> RankMemory:
    return rank_memory(
        config,
        parallel or ParallelConfig(),
        execution or ExecutionConfig(),
        PACK,
        data_parallel_size=data_parallel_size,
        num_microbatches=num_microbatches,
        trained=trained,
        stage=stage,
    )


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


@pytest.mark.parametrize(("precision", "weight", "state"), [("bf16", 2, 12), ("fp32", 4, 8)])
def test_states_cost_their_bytes(precision: str, weight: int, state: int) -> None:
    total = sum(count_parameters(TINY).values())
    memory = memory_of(execution=ExecutionConfig(precision=precision))
    assert (memory.weights, memory.gradients) == (weight * total, 4 * total)
    assert memory.optimizer == state * total


def test_distributed_optimizer_divides_its_state_alone() -> None:
    plain = memory_of(data_parallel_size=4)
    divided = memory_of(
        parallel=ParallelConfig(use_distributed_optimizer=True), data_parallel_size=4
    )
    assert divided.optimizer == plain.optimizer // 4
    assert (divided.weights, divided.gradients) == (plain.weights, plain.gradients)


def test_frozen_modules_cost_their_weights_only() -> None:
    everything, adapter_only = memory_of(), memory_of(trained=frozenset({"adapter"}))
    adapter = count_parameters(TINY)["adapter"]
    assert adapter_only.weights == everything.weights
    assert adapter_only.gradients == 4 * adapter
    assert adapter_only.optimizer == 12 * adapter
    assert adapter_only.vision < everything.vision
    # The gradient passes through the frozen language model, of whose weights there is none.
    light = memory_of(execution=ExecutionConfig(recompute="selective"))
    assert adapter_only.decoder == light.decoder < everything.decoder


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


def test_early_pipeline_stages_hold_more_microbatches() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    first, last = (memory_of(parallel=parallel, stage=stage) for stage in (0, 1))
    entering = 96 * 2 * 64
    assert first.decoder // 2 + last.decoder == memory_of().decoder + entering
    assert first.decoder // 2 > last.decoder  # whose last layer keeps less
    assert (last.vision, first.head) == (0, 0)
    alone = memory_of(parallel=parallel, num_microbatches=1)
    assert alone.decoder == first.decoder // 2


def test_the_moment_that_needs_most_decides() -> None:
    memory = memory_of()
    kept = memory.decoder + memory.vision
    moments = (kept + memory.head, kept + memory.at_work, memory.update)
    assert memory.total == memory.states + max(moments)
    assert memory.update == 4 * max(count_parameters(TINY).values())


MEASURED = json.loads((ROOT / "tests/golden/device_memory.json").read_text())["cells"]


@pytest.mark.parametrize(
    "cell", MEASURED, ids=lambda cell: f"stage{cell['stage']}-rank{cell['rank']}-{cell['flags']}"
)
def test_totals_are_what_the_allocator_hands_out(cell: dict[str, Any]) -> None:
    recipe = ROOT / "examples/mistral_7b"
    files = [f"--config={recipe / name}.yaml" for name in ("model", f"stage{cell['stage']}")]
    plan = make_plan(parse_command_line([*files, *cell["flags"].split()]).config, world_size=8)
    config, layout = plan.config, plan.layout
    ranks_per_stage = 8 // config.parallel.pipeline_model_parallel_size
    memory = rank_memory(
        config.model,
        config.parallel,
        config.execution,
        PackSize(layout.visual_budget, layout.text_budget, len(layout.images)),
        data_parallel_size=plan.data_parallel_size,
        num_microbatches=plan.num_microbatches,
        trained=plan.trained,
        stage=cell["rank"] // ranks_per_stage,
    )
    assert memory.total == pytest.approx(cell["peak"], rel=0.05)

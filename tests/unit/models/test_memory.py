"""Parameter counts against the built model; bytes per rank against sums done by hand.

Activation bytes are compared with what autograd keeps for the real model.
"""

import dataclasses
from typing import Any

import pytest
import torch

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.models.added_parameters import is_added
from megatron_dattn.models.config import (
    AdapterConfig,
    ExactSavings,
    ExecutionConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from megatron_dattn.models.memory import (
    PackSize,
    RankMemory,
    count_parameters,
    rank_memory,
    rank_parameters,
)
from megatron_dattn.parallel.config import ParallelConfig
from tests.support.distributed import run_distributed
from tests.support.megatron import init_model_parallel

ALL = frozenset({"vision_model", "adapter", "language_model"})
TINY = ModelConfig(
    vision=VisionConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=28,
        patch_size=7,
    ),
    adapter=AdapterConfig(max_grid=8),
    language=LanguageConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=128,
    ),
)
PACK = PackSize(visual_rows=64, text_rows=32, images=4)


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


def test_mistral_7b_has_its_published_size() -> None:
    """7,248,023,552 parameters: the sum of the published checkpoint's tensors."""
    assert count_parameters(ModelConfig())["language_model"] == 7_248_023_552


def test_parameters_match_hugging_face_modules() -> None:
    """The counts of transformers' own modules, less the layers and norm above the feature layer."""
    transformers = pytest.importorskip("transformers")
    language = TINY.language
    mistral = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            hidden_size=language.hidden_size,
            num_hidden_layers=language.num_hidden_layers,
            num_attention_heads=language.num_attention_heads,
            num_key_value_heads=language.num_key_value_heads,
            head_dim=language.head_dim,
            intermediate_size=language.intermediate_size,
            vocab_size=language.vocab_size,
            tie_word_embeddings=False,
        )
    )
    vision = TINY.vision
    siglip = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_used_layers,
            num_attention_heads=vision.num_attention_heads,
            intermediate_size=vision.intermediate_size,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            vision_use_head=False,
        )
    )
    norm_above = 2 * vision.hidden_size
    counts = count_parameters(TINY)
    assert counts["language_model"] == sum(p.numel() for p in mistral.parameters())
    assert counts["vision_model"] == sum(p.numel() for p in siglip.parameters()) - norm_above


def _built_parameters(config: ModelConfig, parallel: ParallelConfig) -> dict[str, int]:
    """One rank: parameters per module of the real model."""
    from megatron.core import parallel_state

    from megatron_dattn.models.build import build_model

    stages = parallel.pipeline_model_parallel_size
    init_model_parallel(parallel.tensor_model_parallel_size, stages)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    model = build_model(
        config,
        parallel,
        ExecutionConfig(precision="fp32"),
        pre_process=stage == 0,
        post_process=stage == stages - 1,
        device="meta",
    )
    counts = dict.fromkeys(ALL, 0)
    for name, parameter in model.named_parameters():
        module = "adapter" if is_added(name) else name.partition(".")[0]
        counts[module] += parameter.numel()
    return counts


def test_gemma2_9b_has_its_published_size() -> None:
    """9,241,705,984 parameters: the sum of the published checkpoint's tensors."""
    language = LanguageConfig(
        family="gemma2",
        hidden_size=3584,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        intermediate_size=14336,
        vocab_size=256_000,
        tie_word_embeddings=True,
    )
    assert count_parameters(ModelConfig(language=language))["language_model"] == 9_241_705_984


@pytest.mark.parametrize(
    ("section", "changes", "parallel"),
    [
        ("language", {"family": "gemma2"}, {}),
        ("language", {"vocab_size": 129}, {"tensor_model_parallel_size": 2}),
        (
            "language",
            {"num_hidden_layers": 5},
            {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 2},
        ),
        ("vision", {"family": "clip"}, {}),
        ("adapter", {"input_norm": False}, {}),
    ],
)
def test_other_families_and_splits_have_the_parameters_of_the_built_model(
    section: str, changes: dict[str, Any], parallel: dict[str, int]
) -> None:
    changed = dataclasses.replace(getattr(TINY, section), **changes)
    config = dataclasses.replace(TINY, **{section: changed})
    layout = ParallelConfig(**parallel)
    results = run_distributed(_built_parameters, layout.model_parallel_size, config, layout)
    for rank, built in enumerate(results):
        stage = rank // layout.tensor_model_parallel_size
        assert rank_parameters(config, layout, stage) == built


@pytest.mark.parametrize(
    ("attention", "tensor", "pipeline"),
    [("dattn", 1, 1), ("s_attn", 1, 1), ("dattn", 2, 1), ("dattn", 1, 2)],
)
def test_parameters_are_those_of_the_built_model(
    attention: str, tensor: int, pipeline: int
) -> None:
    config = dataclasses.replace(TINY, attention=attention)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    built = run_distributed(_built_parameters, tensor * pipeline, config, parallel)
    for rank, counts in enumerate(built):
        stage = rank if pipeline > 1 else 0
        assert counts == rank_parameters(config, parallel, stage)
    if tensor == pipeline == 1:
        assert built[0] == count_parameters(config)


def _saved_bytes(execution: ExecutionConfig) -> int:
    """One rank: what TINY keeps."""
    init_model_parallel()
    return _bytes_kept_by(TINY, execution)


def _bytes_kept_by(config: ModelConfig, execution: ExecutionConfig) -> int:
    """Bytes that autograd keeps between forward and backward, parameters excluded."""
    from megatron_dattn.data.sample import PackedBatch
    from megatron_dattn.models.build import build_model

    model = build_model(config, ParallelConfig(), execution)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    images = tuple(ImageSpan(sample, 0, config.image_grid) for sample in range(4))
    layout = TokenLayout((8,) * 4, images, 4 * config.rows_per_image, 32, prompt_lengths=(1,) * 4)
    batch = PackedBatch(
        layout=layout,
        input_ids=torch.zeros(32, dtype=torch.int64),
        labels=torch.ones(32, dtype=torch.int64),
        pixel_values=torch.randn(4, 3, 28, 28),
        sample_keys=[str(sample) for sample in range(4)],
    )
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(batch)
    assert losses.shape == (32,)
    return sum(kept.values())


NAIVE = ExactSavings(visual_queries=False, folded_output=False, unread_rows=False)


@pytest.mark.parametrize(
    ("recompute", "savings"),
    [
        ("none", NAIVE),
        ("none", ExactSavings()),
        ("none", ExactSavings(ffn_chunk_rows=16)),
        ("full", ExactSavings()),
    ],
)
def test_activations_are_near_what_autograd_keeps(recompute: str, savings: ExactSavings) -> None:
    """The estimate is for fused norms and SwiGLU, which this test's local modules are not.

    Per row of a decoder layer (d 64, q 64, e 32, f 96) they keep 6d + 3q + 2e + 4f values where
    fused ones keep 4d + 2q + 2e + 3f: 736 / 1024 = 0.72. Under full recomputation neither keeps
    them. The head is counted with the gradient of its logits, half of which lives in backward only.
    One of four layers keeps less than counted: visual rows that nobody reads.
    """
    execution = ExecutionConfig(
        precision="fp32", recompute=recompute, attention_backend="math", savings=savings
    )
    (kept,) = run_distributed(_saved_bytes, 1, execution)
    memory = memory_of(execution=execution)
    estimate = memory.decoder + memory.vision + memory.head // 2
    assert 0.65 * kept < estimate < 1.15 * kept


def _bytes_kept_by_ffn_width() -> dict[str, list[int]]:
    """Per preset: with an FFN of 96 and of 192, each without and with chunks."""
    init_model_parallel()
    kept: dict[str, list[int]] = {}
    for attention in PRESETS:
        for width in (96, 192):
            language = dataclasses.replace(TINY.language, intermediate_size=width)
            config = dataclasses.replace(TINY, language=language, attention=attention)
            for rows in (0, 8):
                savings = ExactSavings(ffn_chunk_rows=rows)
                execution = ExecutionConfig("fp32", attention_backend="math", savings=savings)
                kept.setdefault(attention, []).append(_bytes_kept_by(config, execution))
    return kept


def test_chunks_keep_nothing_of_any_ffn() -> None:
    """A wider FFN keeps more activations, for visual rows that pass a share of it as well: with 32
    text rows alone, it would be 3 values of 96 more columns in 4 layers. With chunks it does not.
    """
    (kept,) = run_distributed(_bytes_kept_by_ffn_width, 1)
    for attention, (narrow, narrow_chunked, wide, wide_chunked) in kept.items():
        assert wide - narrow >= 4 * 32 * 3 * 96 * 4, attention
        assert wide_chunked == narrow_chunked, attention


def _added_to(attention: str) -> int:
    """Parameters of the adapter that a preset has beside those of `dattn`."""
    counts = [
        count_parameters(dataclasses.replace(TINY, attention=name)) for name in (attention, "dattn")
    ]
    assert counts[0]["language_model"] == counts[1]["language_model"]
    return counts[0]["adapter"] - counts[1]["adapter"]


@pytest.mark.parametrize("attention", ["dattn_tanh", "dattn_sigmoid"])
def test_a_gate_per_head_and_layer(attention: str) -> None:
    assert _added_to(attention) == 4 * 4


def test_cascade_has_the_papers_size() -> None:
    """d 64, q 64, e 32, 4 layers; and 1.34 billion for Mistral-7B, the paper's 9.0 B less 7.6 B."""
    assert _added_to("dattn_cascade") == 4 * (64 * 64 + 64 * 64 + 64 * 64)
    mistral = [
        count_parameters(ModelConfig(attention=name))["adapter"]
        for name in ("dattn_cascade", "dattn")
    ]
    assert mistral[0] - mistral[1] == 1_342_177_280


def test_projectors_replace_the_adapter() -> None:
    """v 32, d 64, 4 layers: a norm and two linear layers with biases in each."""
    saisa = dataclasses.replace(TINY, attention="saisa")
    norm, first, second = 32, 32 * 64 + 64, 64 * 64 + 64
    assert count_parameters(saisa)["adapter"] == 4 * (norm + first + second)
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    shard = 2 * (norm + first // 2 + 64 * 64 // 2 + 64)
    for stage in (0, 1):
        assert rank_parameters(saisa, parallel, stage)["adapter"] == shard


def _built_counts() -> dict[str, dict[str, int]]:
    from megatron_dattn.models.build import build_model
    from megatron_dattn.training.stages import count_parameters as count_built

    init_model_parallel()
    execution = ExecutionConfig(transformer_impl="local")
    return {
        name: count_built(
            build_model(dataclasses.replace(TINY, attention=name), ParallelConfig(), execution)
        )
        for name in PRESETS
    }


def test_every_preset_is_counted_as_built() -> None:
    (built,) = run_distributed(_built_counts, 1)
    for name in PRESETS:
        assert count_parameters(dataclasses.replace(TINY, attention=name)) == built[name], name


def test_the_adapter_keeps_what_enters_the_decoder() -> None:
    """BF16, a frozen encoder of width 32; MLP and language model of width 64; 4 images."""
    pixels, patches = 4 * 3 * 28 * 28 * 4, 16
    per_row = 2 * (2 * 32 + 2 * 64 + 64)
    for attention, rows, bytes_per_row in (
        ("s_attn", patches, per_row),
        ("fastervlm", patches // 4, per_row),
        ("saisa", patches, 2 * 64),  # features, padded
    ):
        config = dataclasses.replace(TINY, attention=attention)
        kept = memory_of(config, trained=frozenset({"adapter"})).vision - pixels
        assert kept == 4 * rows * bytes_per_row, attention


def test_position_tables_follow_the_preset() -> None:
    conventional = dataclasses.replace(TINY, attention="s_attn")
    tables = 2 * TINY.adapter.max_grid * TINY.language.hidden_size
    assert count_parameters(TINY)["adapter"] - count_parameters(conventional)["adapter"] == tables


def test_tied_embeddings_count_once_but_live_on_both_ends() -> None:
    language = dataclasses.replace(TINY.language, tie_word_embeddings=True)
    tied = dataclasses.replace(TINY, language=language)
    embedding = language.vocab_size * language.hidden_size
    untied = count_parameters(TINY)["language_model"]
    assert count_parameters(tied)["language_model"] == untied - embedding
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    for stage in (0, 1):
        assert rank_parameters(tied, parallel, stage) == rank_parameters(TINY, parallel, stage)


def test_pipeline_stages_add_up_to_the_model() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    stages = [sum(rank_parameters(TINY, parallel, stage).values()) for stage in (0, 1)]
    assert sum(stages) == sum(count_parameters(TINY).values())


def test_tensor_parallel_halves_matrices_but_not_norms() -> None:
    one = rank_parameters(TINY, ParallelConfig(), 0)["language_model"]
    two = rank_parameters(TINY, ParallelConfig(tensor_model_parallel_size=2), 0)["language_model"]
    norms = (2 * TINY.language.num_hidden_layers + 1) * TINY.language.hidden_size
    assert two == (one - norms) // 2 + norms


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
    assert adapter_only.decoder == everything.decoder  # the gradient passes through the frozen LLM


def test_decoder_bytes_by_hand() -> None:
    """BF16 dattn, 64 + 32 rows: d 64, q 64, e 32, f 96, 4 heads; 4 layers."""
    per_row = 2 * (4 * 64 + 2 * 32 + 3 * 96)
    per_text_row = 2 * (2 * 64) + 4 * 4  # query and output; log-sum-exps
    layer = 96 * per_row + 32 * per_text_row
    assert memory_of().decoder == 4 * layer
    assert memory_of().at_work == layer
    # Without savings all rows have a query and an output, and text rows theirs once more.
    naive = memory_of(execution=ExecutionConfig(savings=NAIVE))
    assert naive.decoder == 4 * (96 * (per_row + 2 * 2 * 64) + 32 * (2 * 64 + 4 * 4))


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
    layer = memory_of().at_work
    assert first.decoder == 2 * 2 * layer
    assert last.decoder == 2 * layer
    assert (last.vision, first.head) == (0, 0)
    alone = memory_of(parallel=parallel, num_microbatches=1)
    assert alone.decoder == last.decoder

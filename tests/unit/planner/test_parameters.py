"""Parameter counts against the built model, published sizes, and sums done by hand."""

import dataclasses
from typing import Any

import pytest

from megatron_dattn.attention import PRESETS
from megatron_dattn.models.added_parameters import is_added
from megatron_dattn.models.config import LanguageConfig, ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.planner.parameters import count_parameters, rank_parameters
from tests.support.distributed import run_distributed
from tests.support.megatron import init_model_parallel
from tests.support.planner import ALL, TINY


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
        ("language", {"family": "qwen2"}, {"tensor_model_parallel_size": 2}),
        ("language", {"family": "qwen3"}, {"tensor_model_parallel_size": 2}),
        ("language", {"vocab_size": 129}, {"tensor_model_parallel_size": 2}),
        (
            "language",
            {"num_hidden_layers": 5},
            {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 2},
        ),
        ("vision", {"family": "clip"}, {}),
        ("adapter", {"norm": "none"}, {}),
        ("adapter", {"norm": "both", "visual_position": "per_patch"}, {}),
        (
            "adapter",
            {"norm": "behind", "visual_position": "per_patch", "num_places": 5},
            {"tensor_model_parallel_size": 2},
        ),
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
        assert rank_parameters(config, layout, ExecutionConfig(), stage) == built


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
        assert counts == rank_parameters(config, parallel, ExecutionConfig(), stage)
    if tensor == pipeline == 1:
        assert built[0] == count_parameters(config)


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
        assert rank_parameters(saisa, parallel, ExecutionConfig(), stage)["adapter"] == shard


def _built_counts() -> dict[str, dict[str, int]]:
    from megatron_dattn.models.build import build_model
    from megatron_dattn.training.stages import count_parameters as count_built

    init_model_parallel()
    execution = ExecutionConfig(transformer_impl="local")
    return {
        name: count_built(
            [build_model(dataclasses.replace(TINY, attention=name), ParallelConfig(), execution)]
        )
        for name in PRESETS
    }


def test_every_preset_is_counted_as_built() -> None:
    (built,) = run_distributed(_built_counts, 1)
    for name in PRESETS:
        assert count_parameters(dataclasses.replace(TINY, attention=name)) == built[name], name


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
        assert rank_parameters(tied, parallel, ExecutionConfig(), stage) == rank_parameters(
            TINY, parallel, ExecutionConfig(), stage
        )


def test_pipeline_stages_add_up_to_the_model() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    stages = [
        sum(rank_parameters(TINY, parallel, ExecutionConfig(), stage).values()) for stage in (0, 1)
    ]
    assert sum(stages) == sum(count_parameters(TINY).values())


def test_tensor_parallel_halves_matrices_but_not_norms() -> None:
    one = rank_parameters(TINY, ParallelConfig(), ExecutionConfig(), 0)["language_model"]
    two = rank_parameters(TINY, ParallelConfig(tensor_model_parallel_size=2), ExecutionConfig(), 0)[
        "language_model"
    ]
    norms = (2 * TINY.language.num_hidden_layers + 1) * TINY.language.hidden_size
    assert two == (one - norms) // 2 + norms

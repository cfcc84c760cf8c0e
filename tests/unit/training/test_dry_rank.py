"""Any rank of a big world is built and passes a micro-batch, on shapes alone."""

import dataclasses
from pathlib import Path

import pytest

from megatron_dattn.config.cli import load_config
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.training import ModuleLearningRates, OptimizerConfig, TrainingConfig
from megatron_dattn.data.config import DataConfig
from megatron_dattn.errors import ConfigError
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.training import dry_rank as dry_rank_module
from megatron_dattn.training.dry_rank import dry_rank
from tests.support.vlm import tiny_model_config

ROOT = Path(__file__).resolve().parents[3]
EVERYTHING = OptimizerConfig(ModuleLearningRates(1e-5, 1e-5, 1e-5))
# Four data-parallel ranks, two pipeline stages of two tensor-parallel ranks each.
TINY = PretrainConfig(
    model=tiny_model_config(),
    parallel=ParallelConfig(2, 2, sequence_parallel=True),
    data=DataConfig(visual_budget=36, text_budget=32),
    optimizer=EVERYTHING,
    training=TrainingConfig(micro_batch_size=4, global_batch_size=32),
)


@pytest.mark.parametrize("rank", [0, 7, 8, 15])
@pytest.mark.parametrize("attention", ["dattn", "s_attn"])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_every_kind_of_rank_passes(rank: int, attention: str, family: str) -> None:
    config = dataclasses.replace(TINY, model=tiny_model_config(attention, family=family))
    report = dry_rank(config, 16, rank)
    stage, replica, tensor = rank // 8, rank % 8 // 2, rank % 2
    assert f"tensor {tensor} of 2, pipeline {stage} of 2, data {replica} of 4" in report
    assert f"layers      {stage + 1} to {stage + 1} of 2" in report
    assert ("[32] losses" if stage else "[34, 1, 40] hidden states") in report
    loads = "loads them itself" if tensor == 0 else f"gets them from rank {rank - 1}"
    assert f"8 samples of a step's 32, as replica {replica}; {loads}" in report


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("encoder_tp_mode", ["data", "weights"])
def test_ways_of_execution_pass(
    recompute: str, sequence_parallel: bool, encoder_tp_mode: str
) -> None:
    config = dataclasses.replace(
        TINY,
        parallel=ParallelConfig(2, 1, sequence_parallel=sequence_parallel),
        execution=ExecutionConfig(recompute=recompute, encoder_tp_mode=encoder_tp_mode),
    )
    assert "every trained parameter has its gradient" in dry_rank(config, 2, 1)


def test_a_frozen_pipeline_stage_passes() -> None:
    config = dataclasses.replace(TINY, optimizer=OptimizerConfig())
    assert "trained 0, as planned" in dry_rank(config, 16, 15)
    assert "trained 0" not in dry_rank(config, 16, 0)


@pytest.mark.parametrize("name", ["mistral_7b", "gemma2_9b"])
@pytest.mark.parametrize("rank", [0, 517, 1023])
def test_ranks_of_a_thousand_pass_at_full_size(name: str, rank: int) -> None:
    recipe = ROOT / "examples" / name
    config = load_config(recipe / "model.yaml", recipe / "stage2.yaml")
    parallel = dataclasses.replace(
        config.parallel,
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=2,
    )
    training = dataclasses.replace(config.training, micro_batch_size=4)
    data = dataclasses.replace(config.data, visual_budget=2944, text_budget=1024)
    config = dataclasses.replace(config, parallel=parallel, training=training, data=data)
    report = dry_rank(config, 1024, rank)
    width = config.model.language.hidden_size
    assert ("[1024] losses" if rank > 511 else f"[496, 1, {width}] hidden states") in report
    shards = next(line for line in report.splitlines() if "checkpoint" in line)
    assert "all within their tensors" in shards


def test_ranks_that_are_not_there_are_refused() -> None:
    for rank in (-1, 16):
        with pytest.raises(ConfigError, match=rf"--dry-run-rank {rank} is none of 0 to 15"):
            dry_rank(TINY, 16, rank)


def test_interleaved_pipeline_stages_are_refused() -> None:
    parallel = dataclasses.replace(TINY.parallel, virtual_pipeline_model_parallel_size=2)
    model = tiny_model_config(num_hidden_layers=4)
    with pytest.raises(ConfigError, match="virtual_pipeline_model_parallel_size 2 of them; set"):
        dry_rank(dataclasses.replace(TINY, model=model, parallel=parallel), 16, 0)


def test_what_does_not_fit_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the comparison with the plan is able to fail."""
    monkeypatch.setattr(dry_rank_module, "rank_parameters", lambda *_: {"adapter": 1})
    with pytest.raises(AssertionError, match="but planned"):
        dry_rank(TINY, 16, 0)

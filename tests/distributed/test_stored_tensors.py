"""Single parameters read from checkpoints of every layout are the whole model's parameters."""

from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_dattn.checkpoint import load_checkpoint, save_checkpoint
from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.runtime.distributed import destroy_distributed
from tests.support.distributed import run_distributed
from tests.support.megatron import init_model_parallel
from tests.support.vlm import tiny_model, tiny_model_config

FACTS = {"modules": ["vision_model", "adapter", "language_model"], "stage": "stage1"}
LAYOUTS = {"TP1": (1, 1), "TP2": (2, 1), "PP2": (1, 2), "TP2-PP2": (2, 2)}
# With nothing added, with gates, with cross-attention, with projectors of visual tokens.
SOME_PRESETS = ("dattn", "dattn_tanh", "dattn_cascade", "saisa")


def save_presets(folder: str, tensor: int, pipeline: int) -> None:
    """One checkpoint per preset, of weights that are the same under every layout."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    parallel_state.destroy_model_parallel()
    init_model_parallel(tensor, pipeline)
    for preset in SOME_PRESETS:
        model = tiny_model(tiny_model_config(preset), parallel=parallel)
        state = {"model": model.sharded_state_dict()}
        save_checkpoint(Path(folder) / preset, 1, state, facts=FACTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_to_the_whole_model(tmp_path: Path, layout: str) -> None:
    tensor, pipeline = LAYOUTS[layout]
    run_distributed(save_presets, tensor * pipeline, str(tmp_path), tensor, pipeline)
    init_model_parallel()
    try:
        for preset in SOME_PRESETS:
            path = tmp_path / preset / "step-0000001"
            model = tiny_model(tiny_model_config(preset))
            whole = {name: p.detach().clone() for name, p in model.named_parameters()}
            stored = open_tensors(path)
            assert stored.keys() == whole.keys(), preset
            loaded = load_checkpoint(path, {"model": model.sharded_state_dict()})["model"]
            for name, tensor_ in stored.items():
                assert tensor_.shape == whole[name].shape
                assert tensor_.dtype == whole[name].dtype
                value = tensor_.load()
                assert torch.equal(value, whole[name]), (preset, name)
                assert torch.equal(value, loaded[name]), (preset, name)
    finally:
        destroy_distributed()


def save_with_optimizer(folder: str) -> None:
    from tests.support.checkpoint_run import Run, Setup

    run = Run(Setup(bf16=True, distributed_optimizer=True, tensor_parallel=2))
    run.train(1)
    run.checkpointer(folder).save(run.state)


def test_the_optimizers_state_is_no_parameter(tmp_path: Path) -> None:
    run_distributed(save_with_optimizer, 2, str(tmp_path))
    stored = open_tensors(tmp_path / "step-0000001")
    assert {name.partition(".")[0] for name in stored} == set(FACTS["modules"])
    fc1 = stored["language_model.decoder.layers.1.mlp.linear_fc1.weight"]
    assert fc1.dtype == torch.bfloat16
    assert fc1.shape == (112, 40)
    assert fc1.num_bytes == 2 * 112 * 40

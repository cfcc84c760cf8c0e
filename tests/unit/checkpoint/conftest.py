"""Checkpoint tests run in one process with a world of one rank and a handful of tensors."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dattn.runtime.cpu import enable_cpu_runtime

enable_cpu_runtime()  # before anything imports megatron-core

from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor  # noqa: E402

from megatron_dattn.checkpoint import save_checkpoint  # noqa: E402
from megatron_dattn.runtime.distributed import destroy_distributed  # noqa: E402
from tests.support.megatron import init_model_parallel  # noqa: E402

FACTS = {"model": {"width": 4}, "modules": ["body"], "tokenizer": "0" * 64, "stage": "stage1"}


@pytest.fixture(autouse=True, scope="module")
def one_process() -> Iterator[None]:
    init_model_parallel()
    yield
    destroy_distributed()


def small_state(fill: float = 0.0) -> dict[str, Any]:
    """A sharded state dict with tensors of two modules, an object and common values."""

    def shard(key: str, *shape: int) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, torch.full(shape, fill))

    return {
        "model": {
            "body.weight": shard("body.weight", 4, 3),
            "body.bias": shard("body.bias", 4),
            "head.weight": shard("head.weight", 2, 4),
        },
        "object": ShardedObject("object", {"value": fill}, (1,), (0,)),
        "schedule": {"num_steps": int(fill)},
    }


@pytest.fixture
def save(tmp_path: Path) -> Callable[[int], Path]:
    """Save a checkpoint of a step into tmp_path; every tensor holds the step's number."""

    def save_step(step: int) -> Path:
        return save_checkpoint(
            tmp_path,
            step,
            small_state(float(step)),
            facts={**FACTS, "step": step},
            extra_files={"loader-dp-00000.bin": b"place %d" % step},
        )

    return save_step


@pytest.fixture(scope="module")
def saved_once(one_process: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the steps 1 to 6, to be copied."""
    folder = tmp_path_factory.mktemp("saved-once")
    for step in range(1, 7):
        save_checkpoint(folder, step, small_state(float(step)), facts={**FACTS, "step": step})
    return folder


@pytest.fixture
def fill(tmp_path: Path, saved_once: Path) -> Callable[..., None]:
    """Fill tmp_path with checkpoints of some steps, as `save` would, but without the syncs."""

    def copy(*steps: int) -> None:
        for step in steps:
            name = f"step-{step:07d}"
            shutil.copytree(saved_once / name, tmp_path / name)
        pointer = {"checkpoint": f"step-{steps[-1]:07d}", "step": steps[-1]}
        (tmp_path / "latest.json").write_text(json.dumps(pointer) + "\n")

    return copy

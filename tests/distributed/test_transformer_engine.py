"""Models of Transformer Engine's modules: state and losses are those of local ones.

Without a GPU a stand-in takes its place (tests/support/stand_ins), whose products are torch's.
"""

from pathlib import Path
from typing import Any

import pytest
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_dattn.attention import PRESETS
from megatron_dattn.checkpoint.discovery import find_checkpoint
from megatron_dattn.config.training import ModuleLearningRates
from megatron_dattn.runtime.distributed import seed_everything
from megatron_dattn.training.run import build_state, join_ranks
from megatron_dattn.training.stages import build_training_model
from megatron_dattn.training.state import sharded_state
from tests.support.checkpoint_run import Run, Setup
from tests.support.stand_in import run_with
from tests.support.training import training_config

# Of the recipe's stages; the third trains what the second does.
RATES = (ModuleLearningRates(0.0, 1e-3, 0.0), ModuleLearningRates(2e-7, 5e-6, 2e-6))
IMPLEMENTATIONS = ("local", "transformer_engine")


def sharded_entries(tensor: int, preset: str, rates: ModuleLearningRates, which: str) -> Any:
    """What a checkpoint holds of weights and optimizer, from this rank: place -> its sharding."""
    config = training_config(tensor=tensor, rates=rates, attention=preset, transformer_impl=which)
    seed_everything(config.training.seed)
    state = build_state(config, build_training_model(config), None)
    entries = {}
    for value in nested_values(sharded_state(state, is_loading=False)):
        if isinstance(value, ShardedTensorFactory):
            parts = list(nested_values(value.build()))
        else:
            parts = [value]
        for part in parts:
            if not isinstance(part, ShardedTensor):
                # Of the optimizer's settings and the schedule.
                assert type(part).__name__ != "ShardedObject" or "optimizer" in part.key, part
                continue
            entries[part.key, part.global_offset] = (
                part.global_shape,
                part.local_shape,
                part.axis_fragmentations,
                part.dtype,
                part.replica_id,
            )
    return entries


def unequal_states(tensor: int) -> list[tuple[str, int]]:
    join_ranks(training_config(tensor=tensor))
    unequal = []
    for preset in PRESETS:
        for number, rates in enumerate(RATES):
            local, engine = (
                sharded_entries(tensor, preset, rates, which) for which in IMPLEMENTATIONS
            )
            assert any("linear_fc1.layer_norm_weight" in key for key, _ in local)
            if local != engine:
                unequal.append((preset, number))
    return unequal


@pytest.mark.parametrize("tensor", [1, 2])
def test_state_is_sharded_like_that_of_local_modules(tensor: int) -> None:
    """Keys, shapes, cuts and replicas, for every preset and what the stages train."""
    assert run_with("te", unequal_states, tensor, tensor) == [[]] * tensor


def losses_across(folder: str, first: Setup, second: Setup) -> list[list[float]]:
    """Of an uninterrupted run under `first`, and of one that goes on under `second`."""
    whole = Run(first)
    losses = [whole.train(4)]
    part = Run(first)
    both = part.train(2)
    part.checkpointer(folder).save(part.state)
    other = Run(second, seed=99)
    other.checkpointer(folder).resume(other.state)
    return [*losses, both + other.train(2)]

"""Models of Transformer Engine's modules: state and losses are those of local ones.

Without a GPU a stand-in takes its place (tests/support/stand_ins), whose products are torch's.
"""

import dataclasses
import itertools
import math
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.utils import unwrap_model

from megatron_dattn.attention import PRESETS
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.training import ModuleLearningRates
from megatron_dattn.errors import ConfigError
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExactSavings, ExecutionConfig
from megatron_dattn.runtime.distributed import seed_everything
from megatron_dattn.training.run import build_state, join_ranks
from megatron_dattn.training.run_plan import check_fp8_sizes
from megatron_dattn.training.stages import build_training_model
from megatron_dattn.training.state import sharded_state
from megatron_dattn.training.step import train_step
from tests.support.checkpoint_run import Run, Setup
from tests.support.stand_in import run_with
from tests.support.training import build_run, fp8_training_config, leave, training_config
from tests.support.vlm import VISION, make_batch, tiny_model_config

# Of the recipe's stages; the third trains what the second does.
RATES = (ModuleLearningRates(0.0, 1e-3, 0.0), ModuleLearningRates(2e-7, 5e-6, 2e-6))
IMPLEMENTATIONS = ("local", "transformer_engine")
# Each case starts new interpreters: the one of two ranks is for every day.
one_and_two_ranks = pytest.mark.parametrize("tensor", [pytest.param(1, marks=pytest.mark.slow), 2])
RECIPE = Path(__file__).resolve().parents[2] / "examples" / "mistral_7b"


def sharded_entries(tensor: int, model: ModelConfig, rates: ModuleLearningRates, which: str) -> Any:
    """What a checkpoint holds of weights and optimizer, from this rank: place -> its sharding."""
    config = training_config(tensor=tensor, rates=rates, transformer_impl=which)
    config = dataclasses.replace(config, model=model)
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
    models = {preset: tiny_model_config(preset) for preset in PRESETS}
    models["gemma2"] = tiny_model_config(family="gemma2")
    unequal = []
    for name, model in models.items():
        for number, rates in enumerate(RATES):
            local, engine = (
                sharded_entries(tensor, model, rates, which) for which in IMPLEMENTATIONS
            )
            assert any("linear_fc1.layer_norm_weight" in key for key, _ in local)
            if local != engine:
                unequal.append((name, number))
    return unequal


@one_and_two_ranks
def test_state_is_sharded_like_that_of_local_modules(tensor: int) -> None:
    """Keys, shapes, cuts and replicas, for every preset, Gemma-2, and what the stages train."""
    assert run_with("te", unequal_states, tensor, tensor) == [[]] * tensor


def losses_across(folder: str, implementations: tuple[str, str]) -> list[list[float]]:
    """Of an uninterrupted run of the first one, and of its first half gone on by the second."""
    first, second = (Setup(tensor_parallel=2, implementation=name) for name in implementations)
    whole = Run(first).train(4)
    half = Run(first)
    losses = half.train(2)
    half.checkpointer(folder).save(half.state)
    other = Run(second, seed=99)
    assert other.checkpointer(folder).resume(other.state)
    return [whole, losses + other.train(2)]


@pytest.mark.parametrize("implementations", [IMPLEMENTATIONS, IMPLEMENTATIONS[::-1]])
def test_a_checkpoint_goes_on_under_the_other(
    tmp_path: Path, implementations: tuple[str, str]
) -> None:
    for whole, halves in run_with("te", losses_across, 2, str(tmp_path), implementations):
        assert halves == pytest.approx(whole, rel=1e-6)


def train_two_steps(config: PretrainConfig, **pack: Any) -> tuple[list[float], set[str]]:
    """Losses, and the modules that met FP8 (an older model's are gone with it)."""
    check_fp8_sizes(config)
    budgets = config.data.visual_budget, config.data.text_budget
    options = {"budgets": budgets, "grid": config.model.image_grid}
    packs = [make_batch([9, 12], [(2,), (0,)], seed=seed, **options) for seed in range(2)]
    run = build_run(config, [dataclasses.replace(one, **pack) for one in packs])
    losses = [train_step(run).loss for _ in packs]
    leave()
    modules = unwrap_model(run.state.model).named_modules()
    return losses, {name for name, module in modules if getattr(module, "fp8_meta", None)}


def fp8_runs(tensor: int) -> list[tuple[str, list[float], list[float], set[str]]]:
    """Every preset, under one of the recipes and one way of recomputing."""
    runs = []
    recipes = itertools.cycle(get_args(get_type_hints(ExecutionConfig)["fp8_recipe"]))
    ways: list[dict[str, Any]] = [
        {},
        {"recompute": "full"},
        {"savings": ExactSavings(ffn_chunk_tokens=32)},
        {"recompute": "selective"},
    ]
    for preset, recipe, way in zip(PRESETS, recipes, itertools.cycle(ways), strict=False):
        local, _ = train_two_steps(fp8_training_config(tensor, preset, transformer_impl="local"))
        fp8 = {"transformer_impl": "auto", "fp8": "hybrid", "fp8_recipe": recipe, **way}
        runs.append((preset, local, *train_two_steps(fp8_training_config(tensor, preset, **fp8))))
    return runs


LAYERS = "language_model.decoder.layers"
FFN = {f"{LAYERS}.{layer}.mlp.linear_fc{half}" for layer in (0, 1) for half in (1, 2)}


@one_and_two_ranks
def test_fp8_trains_every_preset_in_the_decoders_layers_alone(tensor: int) -> None:
    for preset, local, engine, modules in run_with("te", fp8_runs, tensor, tensor)[0]:
        assert engine == pytest.approx(local, rel=1e-5), preset
        assert {name for name in modules if not name.startswith(LAYERS)} == set(), preset
        assert modules >= FFN, preset
        if preset == "s_attn":
            projections = ("linear_qkv", "linear_proj")
            named = {f"{LAYERS}.{n}.self_attention.{p}" for n in (0, 1) for p in projections}
            assert modules == FFN | named
        if preset == "dattn":  # what visual tokens do not need is left out of the other products
            assert modules == FFN | {f"{LAYERS}.1.self_attention.linear_proj"}


def recipe_budgets(tensor: int, stage: str) -> list[str]:
    """A narrow model with the 7B recipe's packs; what became of them, and of unfit ones."""
    data = yaml.safe_load((RECIPE / f"{stage}.yaml").read_text())["data"]
    budgets = {name: data[name] for name in ("visual_budget", "text_budget")}
    fp8 = {"transformer_impl": "transformer_engine", "fp8": "hybrid"}
    config = fp8_training_config(tensor, "dattn", **budgets, **fp8)
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 128}
    vision = dataclasses.replace(
        VISION, image_size=54, patch_size=2, num_attention_heads=8, intermediate_size=64
    )
    model = tiny_model_config("dattn", vision=vision, hidden_size=64, **sizes)
    model = dataclasses.replace(model, adapter=dataclasses.replace(model.adapter, max_grid=27))
    config = dataclasses.replace(config, model=model)
    pixels = torch.zeros(2, 3, 54, 54)
    losses, _ = train_two_steps(config, pixel_values=pixels)
    assert all(map(math.isfinite, losses))
    unfit = dataclasses.replace(config.data, visual_budget=5840)
    config = dataclasses.replace(config, data=unfit)
    said = []
    for check in (check_fp8_sizes, lambda config: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[__name__], "check_fp8_sizes", check)
            with pytest.raises((ConfigError, AssertionError)) as refusal:
                train_two_steps(config, pixel_values=pixels)
            said.append(str(refusal.value))
    return said


@pytest.mark.parametrize(
    ("tensor", "stage"),
    [(4, "stage2"), pytest.param(8, "stage3", marks=pytest.mark.slow)],
)
def test_the_recipes_packs_train_in_fp8_on_many_ranks(tensor: int, stage: str) -> None:
    for ours, theirs in run_with("te", recipe_budgets, tensor, tensor, stage):
        assert "data.visual_budget 5840 makes" in ours
        assert "FP8 execution requires" in theirs

"""AdamW with one learning rate per module, and the cosine schedule with warm-up.

megatron-core groups parameters by overrides. Two of its habits shape this file: passing overrides
replaces its rule that biases and norms do not decay (so ours are added to the standard ones), and
on load 0.16 tells groups apart by `lr_mult` and a few flags but not by their rate (so every module
has its own `lr_mult`, which is compared and saved but never multiplied by).

A third one shapes its part of a checkpoint. With one group per module, a pipeline stage without
vision encoder has empty groups. megatron-core's state-dict helpers drop empty containers, so a list
`[[], [a]]` comes back as `[[a]]` and a master weight would land in another group's place. Lists of
shards therefore become dictionaries keyed by place while they are saved and loaded (shards go by
their own keys on disk), and lists again after.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    ParamGroupOverride,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import (
    OptimizerConfig as MegatronOptimizerConfig,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from megatron_dattn.config.training import OptimizerConfig
from megatron_dattn.errors import ConfigError
from megatron_dattn.training.flat_state import sharded_flat_state
from megatron_dattn.training.stages import (
    MODULES,
    learning_rate_of,
    module_of_parameter,
    trained_modules,
)

_MASTER_WEIGHTS = "fp32_from_fp16_params"
_GROUP_MARK = {name: float(index) for index, name in enumerate(MODULES, start=1)}
_MODULE_OF_MARK = {mark: name for name, mark in _GROUP_MARK.items()}


@dataclass(frozen=True)
class ParameterGroup:
    """An optimizer group as it really is, for logs and checks."""

    module: str
    peak_rate: float
    learning_rate: float
    """Now."""
    weight_decay: float
    num_parameters: int
    """On this rank."""


def build_optimizer(
    settings: OptimizerConfig,
    chunks: Sequence[DistributedDataParallel],
    *,
    bf16: bool,
    use_distributed_optimizer: bool,
) -> MegatronOptimizer:
    """megatron-core's optimizer over the wrapped chunks; frozen parameters get no state."""
    peak = max(learning_rate_of(settings.learning_rates, name) for name in MODULES)
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=peak,
        min_lr=peak * settings.min_lr_ratio,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=use_distributed_optimizer,
    )
    overrides = get_standard_config_overrides(config)
    overrides.update(_module_overrides(settings))
    return get_megatron_optimizer(config, list(chunks), config_overrides=overrides)


def build_scheduler(
    settings: OptimizerConfig, optimizer: MegatronOptimizer, train_iters: int
) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then a cosine to `min_lr_ratio` of each module's peak.

    Its unit is one training step. The first step of a run uses the rate at 0 steps done.
    """
    peak = max(learning_rate_of(settings.learning_rates, name) for name in MODULES)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=peak,
        min_lr=peak * settings.min_lr_ratio,
        lr_warmup_steps=num_warmup_steps(settings, train_iters),
        lr_decay_steps=train_iters,
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        # A resumed run must ask for the schedule it was saved with; another one is refused.
        use_checkpoint_opt_param_scheduler=False,
    )


def num_warmup_steps(settings: OptimizerConfig, train_iters: int) -> int:
    """Steps of linear warm-up: the ratio rounded up, but at least one step is left to decay."""
    return min(math.ceil(settings.warmup_ratio * train_iters), train_iters - 1)


def parameter_groups(optimizer: MegatronOptimizer) -> list[ParameterGroup]:
    """The optimizer's groups in order, empty ones (modules of other pipeline stages) included."""
    return [
        ParameterGroup(
            module=_MODULE_OF_MARK[group["lr_mult"]],
            peak_rate=float(group["max_lr"]),
            learning_rate=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            num_parameters=sum(parameter.numel() for parameter in group["params"]),
        )
        for group in optimizer.param_groups
    ]


def current_learning_rates(optimizer: MegatronOptimizer) -> dict[str, float]:
    """Learning rate of each trained module at this moment."""
    return {group.module: group.learning_rate for group in parameter_groups(optimizer)}


def describe_optimizer(optimizer: MegatronOptimizer) -> list[str]:
    """The groups as they are in effect, one line each; frozen modules have none."""
    return [
        f"optimizer group: {group.module}, peak learning rate {group.peak_rate:g}, weight decay "
        f"{group.weight_decay:g}, {group.num_parameters:,} parameters on this rank"
        for group in parameter_groups(optimizer)
    ]


def _module_overrides(settings: OptimizerConfig) -> dict[ParamKey, ParamGroupOverride]:
    overrides = {}
    for module in trained_modules(settings.learning_rates):
        rate = learning_rate_of(settings.learning_rates, module)
        predicate = ParamWithNamePredicate(name=module, fn=_belongs_to(module))
        override = {
            "max_lr": rate,
            "min_lr": rate * settings.min_lr_ratio,
            "lr_mult": _GROUP_MARK[module],
        }
        # The type names five keys, but any key of an optimizer group may be overridden.
        key = ParamKey(with_name_predicate=predicate)
        overrides[key] = cast(ParamGroupOverride, override)
    return overrides


def _belongs_to(module: str) -> Callable[[nn.Parameter, str], bool]:
    return lambda _parameter, name: module_of_parameter(name) == module


def sharded_optimizer_state(
    optimizer: MegatronOptimizer,
    model_state: ShardedStateDict,
    *,
    is_loading: bool,
    metadata: dict[str, Any],
) -> ShardedStateDict:
    """The sharded state of the optimizer over the shards of the model.

    Parameters that were never updated are given the zeros that Adam starts from, so a checkpoint
    holds the state of every trained parameter.
    """
    part = single_optimizer(optimizer)
    if part.optimizer is not None:
        part.init_state_fn(part.optimizer, part.config)
    if isinstance(part, DistributedOptimizer) and part.optimizer is not None:
        return {**part.state_dict(), "param_state": sharded_flat_state(part, model_state)}
    state = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    if _MASTER_WEIGHTS in state:
        state[_MASTER_WEIGHTS] = {
            str(group): {str(place): shard for place, shard in enumerate(shards)}
            for group, shards in enumerate(state[_MASTER_WEIGHTS])
            if shards
        }
    return state


def restore_optimizer(optimizer: MegatronOptimizer, loaded: StateDict) -> None:
    """Hand a loaded state to the optimizer; the inverse of `sharded_optimizer_state`.

    It may be that of an optimizer which was distributed, or was not, where this one is the other.

    Raises:
        ConfigError: it was trained with other peak rates, naming the module and both.
    """
    part = single_optimizer(optimizer)
    _check_peak_rates(optimizer, loaded)
    loaded.pop("grad_scaler", None)  # a constant 1.0 in older checkpoints
    if isinstance(part, DistributedOptimizer):
        # What is sharded has been read into its place.
        loaded = {"optimizer": {"param_groups": _groups(loaded)}}
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        loaded["optimizer"].setdefault("state", {})
        by_place = loaded.get(_MASTER_WEIGHTS, {})
        loaded[_MASTER_WEIGHTS] = [
            [by_place[str(group)][str(place)] for place in range(len(parameters))]
            for group, parameters in enumerate(part.fp32_from_float16_groups)
        ]
    elif isinstance(part, FP32Optimizer):
        own = part.optimizer.state_dict()["param_groups"]
        groups = [
            {**group, "params": now["params"]}
            for group, now in zip(_groups(loaded), own, strict=True)
        ]
        loaded = {"state": loaded.get("state", {}), "param_groups": groups}
    optimizer.load_state_dict(loaded)


def _groups(loaded: StateDict) -> list[dict[str, Any]]:
    """Of a loaded state, as it was saved: FP32's has them at its top, the others one below."""
    return loaded.get("optimizer", loaded)["param_groups"]


def _check_peak_rates(optimizer: MegatronOptimizer, loaded: StateDict) -> None:
    """Compare the groups as configured with those to be loaded.

    megatron-core 0.16 takes them as they were saved, rates included, without a word; 0.19 looks
    for groups of the same rates, and says of others that there are none.
    """
    saved = {group["lr_mult"]: group["max_lr"] for group in _groups(loaded)}
    for group in parameter_groups(optimizer):
        rate = saved.get(_GROUP_MARK[group.module], group.peak_rate)
        if rate != group.peak_rate:
            raise ConfigError(
                f"optimizer.learning_rates.{group.module} is {group.peak_rate:g}, but the "
                f"checkpoint was trained with {rate:g}; resume with the same rates, or start a new "
                "stage from its weights (checkpoint.load)"
            )


def single_optimizer(optimizer: Any) -> Any:
    """The optimizer inside megatron-core's chain, which holds several only for expert layers."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    assert len(parts) == 1, f"{len(parts)} chained optimizers: experts are not supported"
    return parts[0]

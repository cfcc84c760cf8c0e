"""The optimizer's part of a checkpoint, in a form that survives empty parameter groups.

With one group per module, a pipeline stage without vision encoder has empty groups. megatron-core's
state-dict helpers drop empty containers, so a list `[[], [a]]` comes back as `[[a]]` and a master
weight would land in another group's place. Lists of shards therefore become dictionaries keyed by
place while they are saved and loaded (shards go by their own keys on disk), and lists again after.
"""

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

_MASTER_WEIGHTS = "fp32_from_fp16_params"


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
    if not is_loading and part.optimizer is not None:
        part.init_state_fn(part.optimizer, part.config)
    state = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    if state.get("param_state", ...) is None:
        del state["param_state"]  # gathered on another data-parallel rank
    if _MASTER_WEIGHTS in state:
        state[_MASTER_WEIGHTS] = {
            str(group): {str(place): shard for place, shard in enumerate(shards)}
            for group, shards in enumerate(state[_MASTER_WEIGHTS])
            if shards
        }
    return state


def restore_optimizer(optimizer: MegatronOptimizer, loaded: StateDict) -> None:
    """Hand a loaded state to the optimizer; the inverse of `sharded_optimizer_state`."""
    part = single_optimizer(optimizer)
    if isinstance(part, Float16OptimizerWithFloat16Params):
        loaded["optimizer"].setdefault("state", {})
        by_place = loaded.get(_MASTER_WEIGHTS, {})
        loaded[_MASTER_WEIGHTS] = [
            [by_place[str(group)][str(place)] for place in range(len(parameters))]
            for group, parameters in enumerate(part.fp32_from_float16_groups)
        ]
    elif isinstance(part, FP32Optimizer):
        loaded.setdefault("state", {})
    optimizer.load_state_dict(loaded)


def single_optimizer(optimizer: Any) -> Any:
    """The optimizer inside megatron-core's chain, which holds several only for expert layers."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    assert len(parts) == 1, f"{len(parts)} chained optimizers: experts are not supported"
    return parts[0]

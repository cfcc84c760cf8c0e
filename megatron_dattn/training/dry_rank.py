"""`--dry-run` of one rank: its share of the model, one micro-batch, its checkpoint, without memory.

The rank is built as a run would build it, on "meta", in a world whose other ranks do not exist
(`runtime/absent_ranks.py`), and passes one full pack forward and backward. What does not fit (a
width that does not divide, a message of the wrong size, a parameter without a gradient, a shard
that reaches beyond its tensor) ends it here, and not on a thousand GPUs:

    WORLD_SIZE=1024 python pretrain_vlm.py --config model.yaml --config stage2.yaml \\
        --dry-run elsewhere --dry-run-rank 517

The optimizer is not built: its bytes are the planner's.
"""

import dataclasses
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from megatron_dattn.batch import PackedBatch
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.errors import ConfigError
from megatron_dattn.models.build import build_model
from megatron_dattn.models.vlm import DAttnVLM
from megatron_dattn.planner.parameters import rank_parameters
from megatron_dattn.runtime.absent_ranks import AbsentRanks, absent_ranks
from megatron_dattn.runtime.distributed import seed_everything
from megatron_dattn.training.run_plan import Plan, make_plan, stage_memory
from megatron_dattn.training.stages import freeze_modules, module_of_parameter

META = torch.device("meta")


def dry_rank(config: PretrainConfig, world_size: int, rank: int) -> str:
    """One rank of a run on so many, as text.

    Raises:
        ConfigError: there is no such rank, or the run could not start.
    """
    plan = make_plan(config, world_size)
    if not 0 <= rank < world_size:
        raise ConfigError(f"--dry-run-rank {rank} is none of 0 to {world_size - 1} (WORLD_SIZE)")
    parallel = config.parallel
    if parallel.virtual_pipeline_model_parallel_size > 1:
        raise ConfigError(
            "--dry-run-rank passes a micro-batch through one group of layers, and a rank has "
            f"parallel.virtual_pipeline_model_parallel_size "
            f"{parallel.virtual_pipeline_model_parallel_size} of them; set that to 1, which keeps "
            "the number of its layers"
        )
    with absent_ranks(
        rank,
        world_size,
        tensor_parallel=parallel.tensor_model_parallel_size,
        pipeline_parallel=parallel.pipeline_model_parallel_size,
    ) as world:
        seed_everything(config.training.seed)
        model = _build(plan)
        lines = [
            f"Rank {rank} of {world_size}, built on no memory",
            *_place(plan),
            *_parameters(plan, model),
            *_micro_batch(plan, model, world),
            *_checkpoint(model),
            *_data(plan, rank),
        ]
    return "\n".join(lines)


def _build(plan: Plan) -> DAttnVLM:
    config = plan.config
    # The one backend that runs on every device, "meta" included.
    execution = dataclasses.replace(
        config.execution, attention_backend="math", transformer_impl="local", fp8="none"
    )
    model = build_model(
        config.model,
        config.parallel,
        execution,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        device=META,
    )
    freeze_modules(model, config.optimizer.learning_rates)
    return model.bfloat16() if execution.precision == "bf16" else model


def _stage() -> int:
    return parallel_state.get_pipeline_model_parallel_rank()


def _place(plan: Plan) -> list[str]:
    parallel, language = plan.config.parallel, plan.config.model.language
    shares = parallel.layers_per_pipeline_stage(language.num_hidden_layers)
    first, own = sum(shares[: _stage()]), shares[_stage()]
    return [
        f"  place       tensor {parallel_state.get_tensor_model_parallel_rank()} of "
        f"{parallel.tensor_model_parallel_size}, pipeline {_stage()} of {len(shares)}, data "
        f"{parallel_state.get_data_parallel_rank()} of {plan.data_parallel_size}",
        f"  layers      {first + 1} to {first + own} of {language.num_hidden_layers}",
    ]


def _parameters(plan: Plan, model: DAttnVLM) -> list[str]:
    """What was built, compared with what the planner counts."""
    built = dict.fromkeys(("vision_model", "adapter", "language_model"), 0)
    for name, parameter in model.named_parameters():
        built[module_of_parameter(name)] += parameter.numel()
    config = plan.config
    planned = rank_parameters(config.model, config.parallel, config.execution, _stage())
    assert built == planned, f"built {built}, but planned {planned}"
    memory = stage_memory(plan, _stage())
    trained = sum(count for module, count in built.items() if module in plan.trained)
    return [
        f"  parameters  {sum(built.values()):,}, trained {trained:,}, as planned",
        f"  memory      {memory.total / 1e9:.1f} GB, most of it for {memory.largest} (modelled)",
    ]


def _micro_batch(plan: Plan, model: DAttnVLM, world: AbsentRanks) -> list[str]:
    """Pass a full pack forward and backward."""
    entering = _entering(plan)
    if entering is not None:
        model.set_input_tensor(entering)
    leaving = model(_full_pack(plan))
    shape, expected = list(leaving.shape), _leaving_shape(plan)
    assert shape == expected, f"the rank's output is {shape} instead of {expected}"
    if leaving.requires_grad:
        leaving.sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"{len(without)} parameters have no gradient, {without[0]} first"
    if entering is not None:
        assert entering.grad is not None, "the pipeline stage before gets no gradient"
    what = "losses" if model.post_process else "hidden states for the next pipeline stage"
    return [
        f"  micro-batch {plan.layout.num_samples} samples, {plan.num_microbatches} per step; "
        f"{shape} {what}; every trained parameter has its gradient",
    ]


def _entering(plan: Plan) -> Tensor | None:
    """Hidden states of the pipeline stage before, [tokens, 1, H] of the model's dtype."""
    if parallel_state.is_pipeline_first_stage():
        return None
    dtype = torch.bfloat16 if plan.config.execution.precision == "bf16" else torch.float32
    return torch.empty(_hidden_shape(plan), dtype=dtype, device=META, requires_grad=True)


def _hidden_shape(plan: Plan) -> list[int]:
    parallel = plan.config.parallel
    ranks = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return [plan.layout.num_tokens // ranks, 1, plan.config.model.language.hidden_size]


def _leaving_shape(plan: Plan) -> list[int]:
    if parallel_state.is_pipeline_last_stage():
        return [plan.layout.num_text_tokens]  # every text token of the pack is labelled
    return _hidden_shape(plan)


def _full_pack(plan: Plan) -> PackedBatch:
    layout, vision = plan.layout, plan.config.model.vision
    labels = torch.full((layout.text_budget,), -100)
    labels[: layout.num_text_tokens] = 0
    dtype = torch.bfloat16 if plan.config.execution.precision == "bf16" else torch.float32
    side = vision.image_size
    return PackedBatch(
        layout=layout,
        input_ids=torch.zeros(layout.text_budget, dtype=torch.int64),
        labels=labels,
        pixel_values=torch.empty(len(layout.images), 3, side, side, dtype=dtype, device=META),
        sample_keys=[],
    ).to(META)


def _checkpoint(model: DAttnVLM) -> list[str]:
    """What this rank would write of the weights; every shard lies within its tensor."""
    shards = list(_shards(model.sharded_state_dict()))
    written = [shard for shard in shards if shard.replica_id in (0, (0, 0, 0))]
    for shard in shards:
        offsets = shard.global_offset[shard.prepend_axis_num :]
        sizes = shard.global_shape[shard.prepend_axis_num :]
        ends = zip(offsets, shard.local_shape, sizes, strict=True)
        outside = any(offset + length > size for offset, length, size in ends)
        assert not outside, f"the shard of {shard.key} reaches beyond {shard.global_shape}"
    num_bytes = sum(prod(shard.local_shape) * shard.dtype.itemsize for shard in written)
    return [
        f"  checkpoint  {len(shards)} shards of weights, all within their tensors; writes "
        f"{len(written)} of them, {num_bytes / 1e9:.2f} GB"
    ]


def _shards(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            yield value


def _data(plan: Plan, rank: int) -> list[str]:
    replica, size = parallel_state.get_data_parallel_rank(), plan.data_parallel_size
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    loads = "loads them itself" if tensor_rank == 0 else f"gets them from rank {rank - tensor_rank}"
    share = plan.config.training.global_batch_size // size
    return [
        f"  data        {share} samples of a step's {plan.config.training.global_batch_size}, "
        f"as replica {replica}; {loads}"
    ]

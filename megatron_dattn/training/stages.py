"""The model of a stage of training: a module whose learning rate is 0.0 is frozen.

The paper's three stages (adapter; everything on captions; everything on instructions) differ in
nothing but data, horizon and these rates, so a stage is a recipe and not code.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from torch import nn

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.training import ModuleLearningRates
from megatron_dattn.models.added_parameters import is_added
from megatron_dattn.models.build import build_model
from megatron_dattn.models.vlm import DAttnVLM
from megatron_dattn.runtime.distributed import get_device, is_rank_0
from megatron_dattn.training.forward_backward import finalize_gradients

logger = logging.getLogger(__name__)

MODULES = ("vision_model", "adapter", "language_model")


def learning_rate_of(rates: ModuleLearningRates, module: str) -> float:
    """Peak learning rate of a module."""
    return float(getattr(rates, module))


def trained_modules(rates: ModuleLearningRates) -> tuple[str, ...]:
    """Modules that are not frozen."""
    return tuple(name for name in MODULES if learning_rate_of(rates, name) > 0)


def module_of_parameter(name: str) -> str:
    """The module a parameter belongs to, whatever wrappers prefix its name with `module.`.

    What a preset adds to the decoder layers belongs to the adapter: it is as new, so it learns with
    the adapter's rate, and from the first stage on. (A gate that starts closed would otherwise keep
    the images out of a stage that trains the adapter alone, and with them every gradient.)
    """
    while name.startswith("module."):
        name = name.removeprefix("module.")
    if is_added(name):
        return "adapter"
    module = name.partition(".")[0]
    assert module in MODULES, f"parameter {name} is in none of {MODULES}"
    return module


def freeze_modules(model: nn.Module, rates: ModuleLearningRates) -> None:
    """Stop gradients of the modules with rate 0.0; call it before the model is wrapped for DDP."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learning_rate_of(rates, module_of_parameter(name)) > 0)


def count_parameters(chunks: Sequence[nn.Module]) -> dict[str, int]:
    """Parameters of each module over all model-parallel ranks, replicas counted once.

    Collective over the model-parallel group. Tied embeddings count once.
    """
    counts = dict.fromkeys(MODULES, 0)
    first_tensor_rank = parallel_state.get_tensor_model_parallel_rank() == 0
    for name, parameter in _named_parameters(chunks):
        is_shard = getattr(parameter, "tensor_model_parallel", False)
        if (is_shard or first_tensor_rank) and not getattr(parameter, "shared", False):
            counts[module_of_parameter(name)] += parameter.numel()
    total = torch.tensor(list(counts.values()), dtype=torch.int64, device=get_device())
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return dict(zip(counts, total.tolist(), strict=True))


def describe_modules(rates: ModuleLearningRates, counts: dict[str, int]) -> list[str]:
    """One line per module: what it holds, and whether it is trained."""
    return [
        f"{name}: {counts[name]:,} parameters, "
        + ("trained" if learning_rate_of(rates, name) > 0 else "frozen, no optimizer state")
        for name in MODULES
    ]


def _named_parameters(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    return itertools.chain.from_iterable(chunk.named_parameters() for chunk in chunks)


def every_pipeline_stage_trains(chunks: Sequence[nn.Module]) -> bool:
    """True if every rank holds at least one trainable parameter; the same answer everywhere."""
    trains = any(parameter.requires_grad for _, parameter in _named_parameters(chunks))
    flag = torch.tensor([int(trains)], device=get_device())
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())


def build_training_model(config: PretrainConfig) -> list[DistributedDataParallel]:
    """This rank's share of the model, frozen where it is not trained and wrapped for training.

    It is one model, or, with interleaved pipeline stages, one chunk after the other. Collective.
    """
    rates = config.optimizer.learning_rates
    chunks = [_build_chunk(config, chunk) for chunk in _chunks(config)]
    for chunk in chunks:
        freeze_modules(chunk, rates)
    for line in describe_modules(rates, count_parameters(chunks)):
        logger.info(line)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        use_distributed_optimizer=uses_distributed_optimizer(config, chunks),
    )
    in_fp32 = config.execution.precision == "fp32"
    wrapped = [
        DistributedDataParallel(
            chunk.config, ddp_config, chunk if in_fp32 else Float16Module(chunk.config, chunk)
        )
        for chunk in chunks
    ]
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_gradients
        if config.parallel.overlap_grad_reduce:
            no_sync = [each.no_sync for each in wrapped]
            chunk.config.no_sync_func = no_sync if wrapped[1:] else no_sync[0]
    return wrapped


def _chunks(config: PretrainConfig) -> Sequence[int | None]:
    number = config.parallel.virtual_pipeline_model_parallel_size
    return range(number) if number > 1 else [None]


def _build_chunk(config: PretrainConfig, chunk: int | None) -> DAttnVLM:
    last = config.parallel.virtual_pipeline_model_parallel_size - 1
    return build_model(
        config.model,
        config.parallel,
        config.execution,
        pre_process=parallel_state.is_pipeline_first_stage() and chunk in (None, 0),
        post_process=parallel_state.is_pipeline_last_stage() and chunk in (None, last),
        chunk=chunk,
    )


def uses_distributed_optimizer(config: PretrainConfig, chunks: Sequence[nn.Module]) -> bool:
    """True if the optimizer's state is spread over data-parallel ranks. Collective.

    Not if a whole pipeline stage is frozen: megatron-core's distributed optimizer cannot save the
    state of a rank that has none. Little is lost, as then only a small part of the model trains.
    """
    wanted = config.parallel.use_distributed_optimizer
    if not wanted or every_pipeline_stage_trains(chunks):
        return wanted
    if is_rank_0():
        logger.warning(
            "a pipeline stage is frozen as a whole: parallel.use_distributed_optimizer is off for "
            "this stage of training"
        )
    return False

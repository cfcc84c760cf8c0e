"""Forward and backward over a step's micro-batches, and what becomes of loss and gradients.

The loss is the sum over labelled tokens divided by their number in the whole global batch, so it
is the same however samples are packed, accumulated or spread over ranks.

Gradients are reduced, divided by the labelled tokens of the global batch, measured and clipped. All
of it is left on the device: the host reads the norm together with the step's other sums
(`sum_over_world`), so it waits once. megatron-core's own functions wait once per question (is there
a token, is anything infinite, what is the norm), and without Transformer Engine or apex once per
tensor (utils.py:1205 of 0.16.1).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from megatron_dattn.attention.transfer import to_device
from megatron_dattn.batch import PackedBatch
from megatron_dattn.models.observer import AttentionObserver
from megatron_dattn.runtime.distributed import get_device

LossOutput = tuple[Tensor, Tensor, tuple[Tensor, int]]


@dataclass(frozen=True)
class LossSum:
    """Summed loss and number of labelled tokens, of this data-parallel replica."""

    loss: Tensor
    """float64 [], on the device: to read it is to wait for the step."""
    num_tokens: int

    @staticmethod
    def nothing() -> "LossSum":
        """The sums of a rank that saw no loss."""
        return LossSum(torch.zeros((), dtype=torch.float64, device=get_device()), 0)


def mean_loss(loss: float, num_tokens: float) -> float:
    """Loss per labelled token; 0 if there was none (its gradient is 0 too)."""
    return loss / num_tokens if num_tokens else loss


def is_loss_rank() -> bool:
    """True if this rank is the one of its data-parallel replica that contributes to global sums.

    It is tensor- and context-parallel rank 0 of the last pipeline stage: there the loss is.
    """
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
        and parallel_state.is_pipeline_last_stage()
    )


def sum_over_world(*values: float | Tensor, own: Sequence[Tensor] = ()) -> list[float]:
    """Sum over all ranks, the same numbers on every rank; NaN and inf survive.

    Args:
        values: numbers, and tensors [] on the device, any dtype; the sums are float64.
        own: tensors [] on the device, any dtype, that come to the host as they are, behind the
            sums: reading them apart would be another wait.
    """
    # float64: FP32 counts exactly to 2^24 only, and a stage sees more tokens than that.
    known = [0.0 if isinstance(value, Tensor) else value for value in values]
    total = to_device(torch.tensor(known, dtype=torch.float64), get_device())
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            total[place] = value
    dist.all_reduce(total)
    return torch.cat([total, *(value.double().view(1) for value in own)]).tolist()


def forward_step(
    batches: Iterator[PackedBatch],
    model: nn.Module,
    *,
    observer: AttentionObserver | None = None,
) -> tuple[Tensor, Callable[[Tensor], LossOutput]]:
    """Pass one micro-batch through this rank's pipeline stage, as megatron-core's schedules want
    it.

    Returns:
        Losses of the labelled tokens, float32 [labelled], on the last pipeline stage, before it
        hidden states [tokens, 1, H]; and `sum_losses`.
    """
    return model(next(batches), observer=observer), sum_losses


def sum_losses(losses: Tensor) -> LossOutput:
    """Sum losses of labelled tokens: float32 [labelled] -> (sum [], count int32 [], both for
    the report: there the count is a number)."""
    # Three values are megatron-core's sign that the loss is a sum: with `calculate_per_token_loss`
    # it leaves the sum alone, adds up the counts (into an int32: the dtype must be that) and lets
    # finalize_model_grads divide by their total over all replicas, after the reduction.
    total = losses.sum()
    count = torch.full((), losses.numel(), dtype=torch.int, device=losses.device)
    return total, count, (total.detach(), losses.numel())


def run_micro_batches(
    chunks: Sequence[nn.Module],
    batches: Iterator[PackedBatch],
    *,
    num_microbatches: int,
    seq_length: int,
    forward_only: bool,
    observer: AttentionObserver | None = None,
) -> LossSum:
    """Run the pipeline schedule; gradients end up reduced and divided by the global token count.

    Args:
        chunks: this rank's model, in one piece or, with interleaved pipeline stages, in several.
            These want as many micro-batches as a multiple of the pipeline stages; a forward pass
            alone repeats the last one for what is missing and drops what comes of it.
        seq_length: S, the tokens of one pack on this rank.
        observer: is shown the queries and keys of this rank's layers.

    Returns:
        This data-parallel replica's sums on its loss rank, zeros elsewhere.
    """
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    interleaved = len(chunks) > 1
    padding = -num_microbatches % stages if interleaved and forward_only else 0
    if padding:
        batches = _with_last_repeated(batches, num_microbatches, padding)
    # Every chunk reads every pack, the first one first: `tee` keeps a pack until all have.
    data = list(itertools.tee(batches, len(chunks))) if interleaved else batches
    outputs = get_forward_backward_func(stages, len(chunks) if interleaved else None)(
        forward_step_func=partial(forward_step, observer=observer),
        data_iterator=data,
        model=list(chunks),
        num_microbatches=num_microbatches + padding,
        # Shape of what pipeline stages send each other: a pack is one sequence of S tokens, however
        # many samples it holds. Under sequence parallelism the schedule divides S itself.
        # It also divides by the context-parallel ranks, which it believes to cut a sequence in
        # equal shares.
        seq_length=seq_length * parallel_state.get_context_parallel_world_size(),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    if not (outputs and is_loss_rank()):
        return LossSum.nothing()
    losses, counts = zip(*outputs[:num_microbatches], strict=True)
    return LossSum(torch.stack(losses).double().sum(), sum(counts))


def _with_last_repeated(
    batches: Iterator[PackedBatch], number: int, times: int
) -> Iterator[PackedBatch]:
    for _ in range(number):
        batch = next(batches)
        yield batch
    yield from itertools.repeat(batch, times)


def finalize_gradients(
    model: list[DistributedDataParallel], num_tokens: Tensor | None = None, **options: Any
) -> None:
    """Reduce the gradients over ranks and divide them by the labelled tokens of all replicas.

    megatron-core's schedules call it after the last micro-batch, as its `finalize_model_grads`,
    whose division asks the host whether there is a token. Without one all gradients are zero.

    Args:
        model: the wrapped pipeline stage, or its chunks.
        num_tokens: of this replica, int32 [], right on the last pipeline stage; overwritten.
        options: handed on.
    """
    finalize_model_grads(model, None, **options)
    for chunk in model:
        encoder = unwrap_model(chunk).vision_model
        if encoder is not None and encoder.shares is not None:
            trained = (p for p in encoder.parameters() if p.requires_grad)
            encoder.shares.sum_gradients(p.main_grad for p in trained)
    if num_tokens is None:
        return
    dist.broadcast(
        num_tokens,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    # Context-parallel ranks have the same ones.
    dist.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group())
    for chunk in model:
        chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))


@torch.no_grad()
def measure_gradients(optimizer: MegatronOptimizer) -> Tensor:
    """Hand the reduced gradients to the optimizer; the square of their global norm.

    Collective over the ranks that hold the model, or, with the distributed optimizer, over the
    world. Every parameter counts on one of them, so what is not finite anywhere shows.

    Returns:
        float32 [], on the device.
    """
    (part,) = optimizer.chained_optimizers  # several only for experts
    part.prepare_grads()
    gradients = _gradients_for_norm(part)
    norm = get_total_norm(gradients) if gradients else torch.zeros((), device=get_device())
    squared = norm.square()
    dist.all_reduce(squared, group=part.get_grad_stats_parallel_group())
    return squared


def update_weights(optimizer: MegatronOptimizer, grad_norm: float, clip_grad: float) -> None:
    """Clip by the global norm (0.0 does not clip) and update, after `measure_gradients`.

    `optimizer.step()` would do both without a chance to ask the other ranks in between.
    """
    # Clipping reads and writes every gradient, also where it multiplies by one.
    if 0 < clip_grad < grad_norm + 1e-6:
        norm = torch.full((), grad_norm, device=get_device())
        (part,) = optimizer.chained_optimizers
        clip_grads_with_norm_(part.get_parameters(), clip_grad, norm)
    optimizer.step_with_ready_grads()


def _gradients_for_norm(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Those whose norm this rank adds to the global one: what several ranks hold (tied embedding,
    norms) counts on one of them. The method's name depends on megatron-core's release."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):  # 0.19
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()

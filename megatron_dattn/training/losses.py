"""Forward and backward over a step's micro-batches, and the loss that does not depend on packing.

The loss is the sum over labelled tokens divided by their number in the whole global batch, so it
is the same however samples are packed, accumulated or spread over ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn

from megatron_dattn.batch import PackedBatch
from megatron_dattn.models.observer import AttentionObserver
from megatron_dattn.runtime.distributed import get_device

LossOutput = tuple[Tensor, Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class LossSum:
    """Summed loss and number of labelled tokens."""

    loss: float
    num_tokens: float

    @property
    def mean(self) -> float:
        """Loss per labelled token; 0 if there was none (its gradient is 0 too)."""
        return self.loss / self.num_tokens if self.num_tokens else self.loss


def is_loss_rank() -> bool:
    """True if this rank is the one of its data-parallel replica that contributes to global sums.

    It is tensor-parallel rank 0 of the last pipeline stage: the one that has both loss and data.
    """
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.is_pipeline_last_stage()
    )


def sum_over_world(*values: float) -> list[float]:
    """Sum over all ranks, the same numbers on every rank; NaN and inf survive."""
    # float64: FP32 counts exactly to 2^24 only, and a stage sees more tokens than that.
    total = torch.tensor(values, dtype=torch.float64, device=get_device())
    dist.all_reduce(total)
    return total.tolist()


def forward_step(
    batches: Iterator[PackedBatch],
    model: nn.Module,
    *,
    observer: AttentionObserver | None = None,
) -> tuple[Tensor, Callable[[Tensor], LossOutput]]:
    """Pass one micro-batch through this rank's stage, as megatron-core's schedules want it.

    Returns:
        Losses of the labelled tokens, float32 [labelled], on the last stage, before it hidden
        states [tokens, 1, H]; and `sum_losses`.
    """
    return model(next(batches), observer=observer), sum_losses


def sum_losses(losses: Tensor) -> LossOutput:
    """Sum losses of labelled tokens: float32 [labelled] -> (sum [], count int32 [], both for
    reports)."""
    # Three values are megatron-core's sign that the loss is a sum: with `calculate_per_token_loss`
    # it leaves the sum alone, adds up the counts (into an int32: the dtype must be that) and lets
    # finalize_model_grads divide by their total over all replicas, after the reduction.
    total = losses.sum()
    count = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    return total, count, {"loss": total.detach(), "num_tokens": count}


def run_micro_batches(
    model: nn.Module,
    batches: Iterator[PackedBatch],
    *,
    num_microbatches: int,
    seq_length: int,
    forward_only: bool,
    observer: AttentionObserver | None = None,
) -> LossSum:
    """Run the pipeline schedule; gradients end up reduced and divided by the global token count.

    Args:
        seq_length: S, the tokens of one pack.
        observer: is shown the queries and keys of this rank's layers.

    Returns:
        This data-parallel replica's sums on its loss rank, zeros elsewhere.
    """
    outputs = get_forward_backward_func()(
        forward_step_func=partial(forward_step, observer=observer),
        data_iterator=batches,
        model=model,
        num_microbatches=num_microbatches,
        # Shape of what stages send each other: a pack is one sequence of S tokens, however many
        # samples it holds. Under sequence parallelism the schedule divides S itself.
        seq_length=seq_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    if not (outputs and is_loss_rank()):
        return LossSum(0.0, 0.0)
    sums = torch.stack(
        [torch.stack([out["loss"].double(), out["num_tokens"].double()]) for out in outputs]
    )
    loss, num_tokens = sums.sum(0).tolist()
    return LossSum(loss, num_tokens)

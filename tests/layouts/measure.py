"""Training as the product does it, in float64: losses, gradients and weights of a cell.

In FP32 layouts differ by the order of their sums, and an update of Adam by the sign of gradients
that are nothing but rounding: what a wrong gradient changes hides in there. In float64 the same
program agrees to nine digits and more. It is the real step (`train_step`), on the model that
`build_training_model` makes; only the width of the numbers is changed from outside.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor

from megatron_dattn.batch import PackedBatch
from megatron_dattn.models import transformer_config
from megatron_dattn.training import stages, step
from tests.layouts.cells import STEPS, Cell, make_packs
from tests.support.training import build_run, leave, local_weights, whole_tensors

TIED_COPY = "language_model.output_layer.weight"
EMBEDDING = "language_model.embedding.word_embeddings.weight"


@dataclass
class Measured:
    """What a cell came to; tensors are whole, by the names of the whole model."""

    losses: list[float]
    gradients: dict[str, Tensor]
    """Of the first and the last step, whose number stands before the name."""
    before: dict[str, Tensor]
    """Weights as training began."""
    after: dict[str, Tensor]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        total = hashlib.sha256(repr(self.losses).encode())
        for tensors in (self.gradients, self.before, self.after):
            for name in sorted(tensors):
                total.update(name.encode())
                total.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
        self.digest = total.hexdigest()


def measure_cells(cells: Sequence[Cell]) -> list[Measured | str]:
    """Measure cells of one number of ranks, one after the other. Collective over the world.

    Ranks after the first return digests.

    Raises:
        RuntimeError: naming the cell that failed.
    """
    packs = make_packs()  # with FP32 pixels, which are what ranks send each other
    use_float64()
    results: list[Measured | str] = []
    for cell in cells:
        try:
            measured = measure(cell, packs)
        except Exception as error:
            raise RuntimeError(f"{cell} failed") from error
        results.append(measured if dist.get_rank() == 0 else measured.digest)
    return results


def measure(cell: Cell, packs: Sequence[PackedBatch]) -> Measured:
    """Train a cell. Collective over the world."""
    run = build_run(cell.config(), packs)
    before = whole_tensors(local_weights(run))
    gradients: dict[str, Tensor] = {}

    def capture(optimizer: Any) -> Tensor:
        """Look at the gradients where they are reduced and divided, but not yet clipped."""
        number = run.state.progress.step + 1
        if number in (1, STEPS):
            for chunk in run.state.chunks:
                _complete(chunk)
            found = whole_tensors(local_weights(run, gradients=True))
            gradients.update({f"step {number}, {name}": found[name] for name in found})
        return measure_gradients(optimizer)

    measure_gradients = step.measure_gradients
    with mock.patch.object(step, "measure_gradients", capture):
        reports = [step.train_step(run) for _ in range(STEPS)]
    assert not any(report.skipped for report in reports)
    after = whole_tensors(local_weights(run))
    assert all(weight.dtype == torch.float64 for weight in after.values())
    leave()
    return Measured([report.loss for report in reports], gradients, before, after)


def _complete(model: Any) -> None:
    """Gather gradients whose sums the distributed optimizer has left in shares."""
    if not model.ddp_config.use_distributed_optimizer:
        return
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for buffer in model.buffers:
        for bucket in buffer.buckets:
            share = bucket.grad_data.view(-1).chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data.view(-1), share, group=group)


def use_float64() -> None:
    """Let this process compute in float64 where the configuration says FP32.

    For the ranks of a test, which end with it: nothing of it is undone.
    """
    torch.set_default_dtype(torch.float64)
    transformer_config._DTYPES["fp32"] = torch.float64
    stages.DistributedDataParallelConfig = lambda **options: DistributedDataParallelConfig(
        **{**options, "grad_reduce_in_fp32": False}
    )
    as_fp32, type_name = torch.Tensor.float, torch.Tensor.type

    def stay(self: Tensor, *args: Any, **options: Any) -> Tensor:
        # cross_entropy.py:28 and distrib_optimizer.py:2419 of megatron-core, which know no more.
        return self if self.dtype == torch.float64 else as_fp32(self, *args, **options)

    def as_if_fp32(self: Tensor, dtype: Any = None, *args: Any, **options: Any) -> Any:
        # distrib_optimizer.py:420 refuses parameters that are called otherwise.
        if dtype is None and self.dtype == torch.float64:
            return "torch.cuda.FloatTensor"
        return type_name(self, dtype, *args, **options)

    torch.Tensor.float = stay  # type: ignore[assignment,method-assign]
    torch.Tensor.type = as_if_fp32  # type: ignore[assignment,method-assign]

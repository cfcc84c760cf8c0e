"""The validation loss while training: measured aside, without a trace in the training state."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from megatron_dattn.data.sample import PackedBatch
from megatron_dattn.errors import DataError
from megatron_dattn.runtime.distributed import get_device
from megatron_dattn.training.losses import LossSum, run_micro_batches, sum_over_world
from megatron_dattn.training.random_states import untouched_random_states
from megatron_dattn.training.stream import BatchStream


class Validation:
    """Loss per labelled token over the first packs of the validation data, each time the same."""

    def __init__(
        self,
        make_loader: Callable[[], Iterable[PackedBatch] | None],
        *,
        max_microbatches: int,
        num_rows: int,
    ) -> None:
        """
        Args:
            make_loader: a fresh loader from the data's beginning; None on ranks that do not load.
            max_microbatches: packs per data-parallel rank at most; fewer if the data has no more.
            num_rows: rows of one pack.
        """
        self._make_loader = make_loader
        self._max_microbatches = max_microbatches
        self._num_rows = num_rows

    def loss(self, model_chunks: list[nn.Module]) -> float:
        """Loss per labelled token over all ranks, the same number on every rank.

        Collective over the world.

        Raises:
            UserError: on all ranks, if the validation data cannot be read or has no label.
        """
        with untouched_random_states(), _evaluation_mode(model_chunks), torch.no_grad():
            stream = BatchStream(self._make_loader(), get_device(), "validation")
            num_microbatches = stream.load_at_most(self._max_microbatches)
            if num_microbatches == 0:
                raise DataError("the validation data has no pack for some data-parallel rank")
            sums = run_micro_batches(
                model_chunks,
                stream,
                num_microbatches=num_microbatches,
                num_rows=self._num_rows,
                forward_only=True,
            )
        total = LossSum(*sum_over_world(sums.loss, sums.num_tokens))
        if total.num_tokens == 0:
            raise DataError("the validation packs hold no labelled token; give other samples")
        return total.mean


@contextlib.contextmanager
def _evaluation_mode(model_chunks: list[nn.Module]) -> Iterator[None]:
    for chunk in model_chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in model_chunks:
            chunk.train()

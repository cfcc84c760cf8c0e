"""The validation loss while training: measured aside, without a trace in the training state."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from megatron.core import parallel_state
from torch import nn

from megatron_dattn.batch import PackedBatch
from megatron_dattn.data.skipped_samples import (
    LoaderCounters,
    as_counts,
    check_share,
    describe,
    from_counts,
)
from megatron_dattn.errors import DataError
from megatron_dattn.runtime.distributed import get_device, is_rank_0
from megatron_dattn.runtime.random_states import untouched_random_states
from megatron_dattn.training.forward_backward import (
    LossSum,
    mean_loss,
    run_micro_batches,
    sum_over_world,
)
from megatron_dattn.training.stream import BatchStream

logger = logging.getLogger(__name__)


class CountingLoader(Iterable[PackedBatch], Protocol):
    """Packs, and what became of the samples so far."""

    def counters(self) -> LoaderCounters: ...


class Validation:
    """Loss per labelled token over the first packs of the validation data, each time the same.

    Every data-parallel replica evaluates the packs that it has, be it none: a small validation set
    is evaluated by some of them, and no sample is left out so that all have equally many.
    """

    def __init__(
        self,
        make_loader: Callable[[], CountingLoader | None],
        *,
        max_microbatches: int,
        seq_length: int,
        max_skipped_fraction: float,
    ) -> None:
        """
        Args:
            make_loader: a fresh loader from the data's beginning; None on ranks that do not load.
            max_microbatches: packs per data-parallel rank at most; fewer if the data has no more.
            seq_length: tokens of one pack.
            max_skipped_fraction: of the validation samples.
        """
        self._make_loader = make_loader
        self._max_microbatches = max_microbatches
        self._seq_length = seq_length
        self._max_skipped_fraction = max_skipped_fraction

    def require_packs(self) -> None:
        """Look whether there is anything to evaluate, and say so if some replicas have nothing.

        Collective over the world; to be called before the first step.

        Raises:
            UserError: on all ranks, if the validation data cannot be read or has no usable sample.
        """
        with untouched_random_states():
            loader = self._make_loader()
            stream = BatchStream(loader, get_device(), "validation")
            num_packs = stream.load_at_most(1)
        has_packs = float(loader is not None and num_packs)
        having, *counts = sum_over_world(has_packs, *as_counts(_counters(loader)))
        if not having:
            met = from_counts(counts)
            raise DataError(
                f"none of the {met.seen} validation samples can be used ({describe(met.skipped)}); "
                "mend data.validation, or set training.eval_interval to 0"
            )
        replicas = parallel_state.get_data_parallel_world_size()
        if having < replicas and is_rank_0():
            logger.info(
                "the validation data has samples for %d of %d data-parallel ranks, which evaluate "
                "it alone",
                int(having),
                replicas,
            )

    def loss(self, chunks: Sequence[nn.Module]) -> float:
        """Loss per labelled token over all ranks, the same number on every rank.

        Collective over the world.

        Raises:
            UserError: on all ranks, if the validation data cannot be read, if too much of it cannot
                be used, or if it has no label.
        """
        # torch's DataLoader draws a seed from the process's random state for every iterator: were
        # it not put back, dropout would differ between runs that validate and runs that do not.
        with untouched_random_states(), _evaluation_mode(chunks), torch.no_grad():
            loader = self._make_loader()
            stream = BatchStream(loader, get_device(), "validation")
            num_microbatches = stream.load_at_most(self._max_microbatches)
            sums = LossSum.nothing()
            if num_microbatches:  # megatron-core's schedules begin with a first micro-batch
                sums = run_micro_batches(
                    chunks,
                    stream,
                    num_microbatches=num_microbatches,
                    seq_length=self._seq_length,
                    forward_only=True,
                )
        loss, num_tokens, *counts = sum_over_world(
            sums.loss, sums.num_tokens, *as_counts(_counters(loader))
        )
        met = from_counts(counts)
        check_share(met.skipped, met.seen, self._max_skipped_fraction)
        if num_tokens == 0:
            raise DataError("the validation packs hold no labelled token; give other samples")
        return mean_loss(loss, num_tokens)


def _counters(loader: CountingLoader | None) -> LoaderCounters:
    return LoaderCounters() if loader is None else loader.counters()


@contextlib.contextmanager
def _evaluation_mode(chunks: Sequence[nn.Module]) -> Iterator[None]:
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.train()

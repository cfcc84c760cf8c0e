"""Micro-batches for this rank, whoever loads them, and a count of what was consumed.

One rank of a data-parallel replica loads; the others get the packs from it (parallel/batch.py). A
step's packs are fetched before the step begins: that is where a broken data set is noticed, and
where all ranks can still agree to stop.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state

from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.batch import PackedBatch
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.encoder import ModelSizes
from megatron_dattn.data.loader import VLMLoader, build_loader
from megatron_dattn.errors import DataError, UserError
from megatron_dattn.parallel.batch import is_loading_rank, pack_on_device, share_packs
from megatron_dattn.runtime.random_states import untouched_random_states
from megatron_dattn.runtime.rank_errors import all_ranks_agree


@dataclass
class Consumed:
    """What went through a stream since the last `take`, on this data-parallel rank."""

    layouts: list[TokenLayout] = field(default_factory=list)
    sample_keys: list[list[str]] = field(default_factory=list)
    """Per pack."""
    wait_seconds: float = 0.0
    """Of the rank that loads; 0 on the others."""

    @property
    def num_samples(self) -> int:
        return sum(layout.num_samples for layout in self.layouts)

    @property
    def text_tokens(self) -> int:
        return sum(layout.num_text_tokens for layout in self.layouts)

    @property
    def visual_tokens(self) -> int:
        return sum(layout.num_visual_tokens for layout in self.layouts)


class BatchStream(Iterator[PackedBatch]):
    """An iterator over micro-batches on the device; `load` first, then `next` as often."""

    def __init__(
        self, loader: Iterable[PackedBatch] | None, device: torch.device, name: str = "training"
    ) -> None:
        """
        Args:
            loader: None on ranks that do not load.
            name: of the data, for errors.
        """
        self._loader = loader
        self._source: Iterator[PackedBatch] | None = None
        self._device = device
        self._name = name
        self._waiting: deque[PackedBatch] = deque()
        self._consumed = Consumed()

    def load(self, num_packs: int) -> None:
        """Fetch the packs of the next step. Collective over the world.

        Raises:
            UserError: on all ranks, if the loader of any rank failed or came to its end.
        """
        error = self._fetch(num_packs)
        if error is None and self._loader is not None and len(self._waiting) < num_packs:
            error = DataError(
                f"the {self._name} data gave {len(self._waiting)} of {num_packs} packs; give more "
                "samples"
            )
        all_ranks_agree(error)
        self._waiting = deque(share_packs(self._waiting))

    def load_at_most(self, num_packs: int) -> int:
        """Fetch up to that many packs; how many this data-parallel replica has.

        Collective over the world.

        Raises:
            UserError: on all ranks, if the loader of any rank failed.
        """
        all_ranks_agree(self._fetch(num_packs))
        self._waiting = deque(share_packs(self._waiting))
        return len(self._waiting)

    def _fetch(self, num_packs: int) -> UserError | None:
        """Wait for packs until there are that many or no more; errors are handed back."""
        if self._loader is None:
            return None
        started = time.perf_counter()
        try:
            with untouched_random_states():
                if self._source is None:
                    self._source = iter(self._loader)
                missing = num_packs - len(self._waiting)
                self._waiting.extend(itertools.islice(self._source, max(0, missing)))
        except UserError as error:
            return error
        finally:
            self._consumed.wait_seconds += time.perf_counter() - started
        return None

    def __next__(self) -> PackedBatch:
        assert self._waiting, "more packs asked for than were loaded"
        batch = pack_on_device(self._waiting.popleft(), self._device)
        self._consumed.layouts.append(batch.whole or batch.layout)
        self._consumed.sample_keys.append(batch.sample_keys)
        return batch

    def take(self) -> Consumed:
        """Take out what was consumed since the last call."""
        consumed, self._consumed = self._consumed, Consumed()
        return consumed


def make_loader(
    config: PretrainConfig, datasets: list[DatasetConfig], *, training: bool
) -> VLMLoader | None:
    """The loader of this rank's data-parallel replica; None on ranks that do not load."""
    if not is_loading_rank():
        return None
    return loader_of_rank(
        config,
        datasets,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        training=training,
    )


def loader_of_rank(
    config: PretrainConfig,
    datasets: Sequence[DatasetConfig],
    data_parallel_rank: int,
    data_parallel_size: int,
    *,
    training: bool,
) -> VLMLoader:
    """The loader of one data-parallel replica; errors as of `build_loader`. Local."""
    model = config.model
    packs = config.training.num_microbatches(data_parallel_size) if training else 1
    return build_loader(
        config.data,
        datasets=datasets,
        sizes=ModelSizes(model.vision.image_size, model.image_grid, model.language.vocab_size),
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        seed=config.training.seed,
        training=training,
        packs_per_step=packs,
    )

"""A prepared LLaVA file on disk: JSON lines beside the index of their byte offsets.

`tools/prepare_data.py` makes both. What is wrong with them is found here, before any worker starts.
"""

import contextlib
import hashlib
import io
import logging
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.energon import CrudeJsonlDatasetFactory, EPath, WorkerConfig
from megatron_dattn.errors import DataError

INDEX_SUFFIX = ".idx"
SLICE_LENGTH = 32  # neighbouring rows that are read one after the other before shuffling

logger = logging.getLogger(__name__)

_OFFSET = struct.Struct("Q")


@dataclass(frozen=True)
class PreparedDataset:
    """A data set that can be read."""

    path: Path
    image_root: Path
    weight: float
    num_samples: int
    fingerprint: str  # changes when rows are added, removed or change their length

    @property
    def name(self) -> str:
        return self.path.stem


def open_dataset(config: DatasetConfig) -> PreparedDataset:
    """Check a data set and its image root.

    Raises:
        DataError: it is missing, not prepared, or changed since it was prepared.
    """
    path = Path(config.path)
    if not path.is_file():
        raise DataError(f"data set '{path}' does not exist")
    if path.suffix != ".jsonl":
        raise DataError(
            f"data set '{path}' is not prepared: run `python tools/prepare_data.py {path} --output "
            "FOLDER` and use the .jsonl file it writes"
        )
    if config.weight <= 0:
        raise DataError(f"data set '{path}' has weight {config.weight}; it must be positive")
    image_root = Path(config.image_root) if config.image_root is not None else path.parent
    if not image_root.is_dir():
        raise DataError(f"image root '{image_root}' of data set '{path}' is not a folder")
    index = Path(f"{path}{INDEX_SUFFIX}")
    if not index.is_file():
        raise DataError(
            f"data set '{path}' has no index: run `python tools/prepare_data.py {path} --output "
            "FOLDER`"
        )
    offsets = index.read_bytes()
    num_samples = len(offsets) // _OFFSET.size - 1
    if num_samples < 1 or _OFFSET.unpack(offsets[-_OFFSET.size :])[0] != path.stat().st_size:
        raise DataError(f"data set '{path}' was changed after its index was made; prepare it again")
    return PreparedDataset(
        path=path.absolute(),
        image_root=image_root.absolute(),
        weight=config.weight,
        num_samples=num_samples,
        fingerprint=hashlib.sha256(offsets).hexdigest(),
    )


class RowSource(CrudeJsonlDatasetFactory):
    """Energon's reader of JSON lines; rows stay undecoded, so that bad ones can be counted."""

    def __init__(
        self, dataset: PreparedDataset, *, training: bool, worker_config: WorkerConfig
    ) -> None:
        super().__init__(
            EPath(str(dataset.path)),
            training=training,
            worker_config=worker_config,
            max_samples_per_sequence=SLICE_LENGTH if training else None,
        )
        self.subflavors = {"name": dataset.name, "image_root": str(dataset.image_root)}

    def build(self, worker_rotation_offset: int = 0) -> Any:
        # Energon prints each worker's share of the rows.
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            rows = super().build(worker_rotation_offset)
        logger.debug("%s", printed.getvalue().strip())
        return rows

    def _load_sample(self, sample: dict[str, Any]) -> Any:
        sample["__subflavors__"] = self.subflavors
        return super()._load_sample(sample)

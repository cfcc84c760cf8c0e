"""A prepared LLaVA file on disk: JSON lines beside the index of their byte offsets.

`tools/prepare_data.py` makes both. What is wrong with them is found here, before any worker starts.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.json_lines import INDEX_SUFFIX, OFFSET
from megatron_dattn.errors import DataError

# What nobody asks for, but what a number of records, once written as a weight, amounts to.
MAX_WEIGHT = 1000


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
    if not 0 < config.weight <= MAX_WEIGHT:
        raise DataError(
            f"data set '{path}' has weight {config.weight:g}, which must be positive and at most "
            f"{MAX_WEIGHT}: it is how often an epoch shows each record, so that a file's share is "
            "its records times its weight; leave it out to show every record once"
        )
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
    num_samples = len(offsets) // OFFSET.size - 1
    if num_samples < 1 or OFFSET.unpack(offsets[-OFFSET.size :])[0] != path.stat().st_size:
        raise DataError(f"data set '{path}' was changed after its index was made; prepare it again")
    return PreparedDataset(
        path=path.absolute(),
        image_root=image_root.absolute(),
        weight=config.weight,
        num_samples=num_samples,
        fingerprint=hashlib.sha256(offsets).hexdigest(),
    )

"""A mixture: which files a data set is put together from, in LLaVA-NeXT's form of YAML."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from megatron_dattn.data.dataset import MAX_WEIGHT
from megatron_dattn.errors import ConfigError, DataError, quoted
from megatron_dattn.yaml_files import read_yaml


@dataclass(frozen=True)
class Source:
    """One LLaVA file of a mixture."""

    path: Path
    image_root: Path | None = None
    weight: float = 1.0
    sampling: str = "all"
    """`all`, or `first:N`, `end:N`, `random:N` where N is a number of records or a percentage."""


class _MixtureEntry(TypedDict, total=False):
    json_path: str
    image_root: str | None
    weight: float
    sampling_strategy: str


class _Mixture(TypedDict):
    datasets: list[_MixtureEntry]


def read_mixture(path: Path) -> list[Source]:
    """The sources named by a mixture file in LLaVA-NeXT's form.

    `datasets:` is a list of `json_path`, and optionally `image_root`, `weight` and
    `sampling_strategy`; relative paths count from the mixture file.

    Raises:
        DataError: the file is missing or has another form.
    """
    try:
        content = read_yaml(path, _Mixture)
    except ConfigError as error:
        raise DataError(f"mixture '{path}' cannot be read: {error}") from error
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"mixture '{path}' must have a list 'datasets'")
    return [_mixture_entry(path, entry) for entry in entries]


def _mixture_entry(mixture: Path, entry: Any) -> Source:
    known = {"json_path", "image_root", "weight", "sampling_strategy"}
    if not isinstance(entry, dict) or "json_path" not in entry or set(entry) - known:
        raise DataError(f"mixture '{mixture}': an entry has {sorted(known)}, got {quoted(entry)}")
    root, weight = entry.get("image_root"), entry.get("weight", 1.0)
    if not isinstance(entry["json_path"], str) or not isinstance(root, str | None):
        raise DataError(
            f"mixture '{mixture}': json_path and image_root are paths, got {quoted(entry)}"
        )
    if not isinstance(weight, int | float) or not 0 < weight <= MAX_WEIGHT:
        raise DataError(
            f"mixture '{mixture}': a weight is how often an epoch shows each record of a file, a "
            f"positive number up to {MAX_WEIGHT}, got {quoted(weight)}"
        )
    return Source(
        path=mixture.parent / entry["json_path"],
        image_root=None if root is None else mixture.parent / root,
        weight=float(weight),
        sampling=str(entry.get("sampling_strategy", "all")),
    )

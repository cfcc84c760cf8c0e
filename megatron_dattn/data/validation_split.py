"""A share of the records for validation, split by image: records that share one are on one side.

Data sets ask several questions about an image in several records. Split by record, a validation
would ask about images that were trained on, and measure memory.

Records are nodes of a graph through the images that they name, and a side takes whole components of
it. A record without an image stands for itself, together with those of the same content. Neither
the order of the records nor of the files decides about a side, but the least hash in a component.

Memory: 12 bytes a record and 8 for each image that it names (8 for the record itself where it names
none); while images are sorted and numbered, up to 60 more for each of these. Two images are the
same if their paths are: files are not opened. Those that come with their records (of parquet files
and shards) are the same if their bytes are.
"""

import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dattn.data.conversation import image_paths
from megatron_dattn.data.duplicates import bytes_hash, content_hash, hash_of
from megatron_dattn.data.image_files import RecordWithImages, locate_image
from megatron_dattn.data.missing import without
from megatron_dattn.data.mixture import Source
from megatron_dattn.data.prepare import exclusions, prepare, require_layout
from megatron_dattn.data.prepare_targets import Choice, OutputLayout, Prepared, holds_images
from megatron_dattn.data.record_files import select_records
from megatron_dattn.data.rejection import SampleError
from megatron_dattn.errors import ConfigError, DataError


@dataclass(frozen=True)
class Split:
    """Record numbers in order, for the real path of each file that has any."""

    train: "dict[str, array[int]]"
    validation: "dict[str, array[int]]"


def prepare_with_validation(
    sources: list[Source],
    output: Path,
    *,
    share: float,
    choice: Choice,
    layout: OutputLayout | None = None,
    on_records: Callable[[int], object] = lambda count: None,
) -> Iterator[Prepared]:
    """Prepare a mixture as `<output>/train.yaml` and `<output>/validation.yaml`.

    Args:
        share: of the records that goes to validation, if images do not hold too many together.
        on_records: called with the number of records that were written since.

    Raises:
        ConfigError: as of `prepare`, or no such share is possible.
        DataError: as of `prepare`, or one side would be empty.
    """
    layout = layout or OutputLayout()
    require_layout(sources, layout)
    excluded = exclusions(sources, choice)
    split = split_by_image(sources, share=share, seed=choice.seed, excluded=excluded)
    for section, mine, others in (
        ("train", split.train, split.validation),
        ("validation", split.validation, split.train),
    ):
        left_out = _joined(excluded, others)
        suffix = "" if section == "train" else "-validation"
        own = replace(choice, without=None, left_out=left_out, suffix=suffix)
        having = [source for source in sources if os.path.realpath(source.path) in mine]
        brings = any(holds_images(source.path) for source in having)
        yield from prepare(
            having,
            output,
            section=section,
            choice=own,
            layout=layout if brings else replace(layout, images_out=None),
            on_records=on_records,
        )


def split_by_image(
    sources: list[Source],
    *,
    share: float,
    seed: int,
    excluded: "Mapping[str, Sequence[int]] | None" = None,
) -> Split:
    """Deal the selected records of all sources to two sides.

    Validation gets as near to its share as whole components allow, and never more than that.

    Args:
        excluded: numbers of records that are on neither side, in order, for the real path of each
            file.

    Raises:
        ConfigError: `share` is not between 0 and 1.
        DataError: a file cannot be read, or one side would be empty.
    """
    if not 0.0 < share < 1.0:
        raise ConfigError(f"--validation-share must lie between 0 and 1, got {share:g}")
    graph = _Graph()
    numbers = []
    for source in sources:
        root = os.path.realpath(source.image_root or source.path.parent)
        taken = array("q")
        left_out = (excluded or {}).get(os.path.realpath(source.path), ())
        selected = select_records(source.path, source.sampling, seed=seed)
        for number, record in without(selected, left_out):
            graph.add(_nodes(record, root))
            taken.append(number)
        numbers.append(taken)
    chosen = _chosen(graph.components(), share, seed)
    sides: tuple[dict[str, array[int]], dict[str, array[int]]] = {}, {}
    first = 0
    for source, taken in zip(sources, numbers, strict=True):
        mine = chosen[first : first + len(taken)]
        first += len(taken)
        for side, members in ((sides[0], ~mine), (sides[1], mine)):
            own = np.asarray(taken)[members]
            if len(own):
                name = os.path.realpath(source.path)
                side[name] = array("q", np.union1d(side.get(name, ()), own).astype(np.int64))
    return Split(*sides)


def _nodes(record: Any, root: str) -> list[int]:
    """Hashes of what ties a record to others."""
    try:
        paths = image_paths(record) if isinstance(record, dict) else ()
        brought = record.files if isinstance(record, RecordWithImages) else {}
        images = [
            hash_of(
                f"bytes {bytes_hash(brought[path])}"
                if path in brought
                else f"image {locate_image(root, path)}"
            )
            for path in paths
        ]
    except SampleError:  # the loader skips it
        images = []
    return images or [content_hash(record) or 0]


class _Graph:
    """Records by the nodes that they touch."""

    def __init__(self) -> None:
        self._nodes = array("q")
        self._counts = array("I")

    def add(self, nodes: list[int]) -> None:
        """Take the next record."""
        self._nodes.extend(nodes)
        self._counts.append(len(nodes))

    def components(self) -> np.ndarray:
        """The least hash in the component of each record, int64 [records]."""
        hashes, places = np.unique(np.asarray(self._nodes), return_inverse=True)
        counts = np.asarray(self._counts)
        ends = np.cumsum(counts, dtype=np.int64)
        parents = array("q", range(len(hashes)))
        for record in np.flatnonzero(counts > 1).tolist():
            first, *others = places[ends[record] - counts[record] : ends[record]].tolist()
            for other in others:
                _join(parents, first, other)
        roots = np.asarray(parents)
        # The hashes are in order and the lesser place is the parent: a root is a least hash.
        while not np.array_equal(roots, upper := roots[roots]):
            roots = upper
        return hashes[roots[places[ends - counts]]]


def _join(parents: "array[int]", one: int, other: int) -> None:
    """Union-find, with paths halved on the way."""
    roots = []
    for place in (one, other):
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = parents[place]
        roots.append(place)
    parents[max(roots)] = min(roots)


def _chosen(components: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which records go to validation, bool [records].

    Components come in the order of a hash of theirs and of the seed; one that is larger than what
    is left of the share is passed over.
    """
    total = len(components)
    roots, places, sizes = np.unique(components, return_inverse=True, return_counts=True)
    keys = (hash_of(f"seed {seed}: {root}") for root in roots)
    order = np.argsort(np.fromiter(keys, np.int64, len(roots)))
    left = max(1, round(share * total))
    taken = np.zeros(len(roots), dtype=bool)
    for place in order:
        if left == 0:
            break
        if sizes[place] <= left:
            taken[place], left = True, left - int(sizes[place])
    if not taken.any() or taken.all():
        raise DataError(
            f"--validation-share {share:g} of {total} records cannot be split off: their images "
            f"hold them together in {len(roots)} groups, the largest of {sizes.max()} records, the "
            f"smallest of {sizes.min()}"
        )
    return taken[places]


def _joined(
    one: "dict[str, array[int]]", other: "dict[str, array[int]]"
) -> "dict[str, array[int]]":
    return {
        name: array("q", np.union1d(one.get(name, ()), other.get(name, ())).astype(np.int64))
        for name in one.keys() | other.keys()
    }

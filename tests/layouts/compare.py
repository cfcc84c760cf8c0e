"""How far a layout is from one process, and how far it may be.

Numbers are float64, with roundings of 1e-16. A loss is a sum of some thousands of products and
agrees to 1e-13. A gradient passes all layers twice and agrees to 1e-11 of the largest entry of its
parameter; of that, because single entries may nearly cancel. An update of Adam divides a gradient
by its own size plus eps, 1e-8: of entries whose exact gradient is zero, and that hold 1e-17
instead, that makes 1e-9 of a learning rate. So weights agree to 1e-8 of how far their parameter has
moved. What was found is thirty to a hundred times less (docs/parallelism.md).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tests.layouts.cells import Cell
from tests.layouts.measure import EMBEDDING, TIED_COPY, Measured, measure_cells
from tests.support.distributed import run_distributed

TOLERANCES = {"loss": 1e-13, "gradients": 1e-11, "weights": 1e-8}
_SECONDS_PER_CELL = 60.0
_CELLS_PER_START = 12  # megatron-core's process groups of former cells stay open


@dataclass(frozen=True)
class Deviation:
    """The largest differences of a cell from the same training in one process, relative."""

    loss: float
    gradients: float
    weights: float
    worst: str
    """The parameter whose gradient differs most."""

    @property
    def is_small(self) -> bool:
        return all(getattr(self, name) <= limit for name, limit in TOLERANCES.items())


def compare(
    cells: Sequence[Cell], progress: Callable[[str], None] = lambda line: None
) -> dict[Cell, Deviation]:
    """Train all cells, those of one number of ranks after each other, and their references.

    Raises:
        RankError: a cell failed, or replicas of it ended in different states.
    """
    alone = sorted({cell.alone for cell in cells})
    by_size: dict[int, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_size[cell.layout.num_ranks].append(cell)
    progress(f"{len(alone)} in one process")
    references = dict(zip(alone, _measured(1, alone), strict=True))
    found: dict[Cell, Deviation] = {}
    for size, group in sorted(by_size.items()):
        progress(f"{len(group)} on {size} ranks")
        for cell, measured in zip(group, _measured(size, group), strict=True):
            found[cell] = deviation(measured, references[cell.alone])
    return {cell: found[cell] for cell in cells}


def _measured(num_ranks: int, cells: Sequence[Cell]) -> list[Measured]:
    """What cells of one number of ranks come to, some from each start of the ranks."""
    results: list[Measured] = []
    for first in range(0, len(cells), _CELLS_PER_START):
        some = cells[first : first + _CELLS_PER_START]
        results += _measured_at_once(num_ranks, some)
    return results


def _measured_at_once(num_ranks: int, cells: Sequence[Cell]) -> list[Measured]:
    first, *others = run_distributed(
        measure_cells, num_ranks, cells, timeout=_SECONDS_PER_CELL * len(cells) + 60
    )
    for rank, digests in enumerate(others, 1):
        for cell, measured, digest in zip(cells, first, digests, strict=True):
            assert digest == measured.digest, f"{cell}: rank {rank} is not in rank 0's state"
    return first


def deviation(found: Measured, expected: Measured) -> Deviation:
    """The largest relative differences; infinite where names differ or what is frozen moved."""
    found_after, expected_after = _without_copy(found.after), _without_copy(expected.after)
    gradients, expected_gradients = (
        _without_copy(found.gradients),
        _without_copy(expected.gradients),
    )
    if (gradients.keys(), found_after.keys()) != (expected_gradients.keys(), expected_after.keys()):
        names = sorted(gradients.keys() ^ expected_gradients.keys())
        names += sorted(found_after.keys() ^ expected_after.keys())
        return Deviation(math.inf, math.inf, math.inf, f"only one has {', '.join(names[:4])}")
    by_gradient = {
        name: _relative(gradients[name], gradient, gradient)
        for name, gradient in expected_gradients.items()
    }
    worst = max(by_gradient, key=lambda name: by_gradient[name])
    return Deviation(
        loss=max(
            abs(loss - other) / abs(other)
            for loss, other in zip(found.losses, expected.losses, strict=True)
        ),
        gradients=by_gradient[worst],
        weights=max(
            _relative(found_after[name], weight, weight - expected.before[name])
            for name, weight in expected_after.items()
        ),
        worst=worst,
    )


def _without_copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take out the last pipeline stage's copy of a tied embedding, which must be its equal."""
    copies = [name for name in tensors if name.endswith(TIED_COPY)]
    embedding = {name: f"{name.removesuffix(TIED_COPY)}{EMBEDDING}" for name in copies}
    equal = {name for name in copies if _is_copy(tensors, name, embedding[name])}
    return {name: tensor for name, tensor in tensors.items() if name not in equal}


def _is_copy(tensors: dict[str, Tensor], name: str, other: str) -> bool:
    return other in tensors and bool((tensors[name] == tensors[other]).all())


def _relative(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    """The largest difference by the largest entry of a scale; all are float64 of any shape."""
    difference, largest = (found - expected).abs().max().item(), scale.abs().max().item()
    if difference == 0:
        return 0.0
    return difference / largest if largest else math.inf

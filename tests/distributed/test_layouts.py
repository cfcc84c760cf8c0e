"""The comparison of layouts: some of its cells, and that it is able to fail."""

import copy
import math

import pytest
import torch

from megatron_dattn.training.validate import Validation
from tests.layouts.cells import IN_EVERY_TEST_RUN, Cell, make_packs
from tests.layouts.compare import compare, deviation
from tests.layouts.layout import Layout
from tests.layouts.measure import EMBEDDING, TIED_COPY, Measured
from tests.layouts.resharding import TOLERANCE, Move, reshard
from tests.support.distributed import run_distributed
from tests.support.training import PackLoader, build_run, leave

SHORT_MOVES = (
    Move("tp2+sp", "pp2"),
    Move("tp2+sp", "cp2"),
    Move("tp2+sp", "pp2xvp2"),
    Move("tp2xdp2+sp+distopt", "dp2+distopt"),
    Move("tp2+sp", "dp1", new_stage=True),
)


def test_layouts_are_as_exact_as_one_process() -> None:
    found = compare([Cell.parse(name) for name in IN_EVERY_TEST_RUN])
    assert {cell: deviation for cell, deviation in found.items() if not deviation.is_small} == {}


def test_checkpoints_go_on_under_other_layouts() -> None:
    found = reshard(SHORT_MOVES)
    assert {move: loss for move, loss in found.items() if loss > TOLERANCE} == {}


def _validate(layout: str) -> tuple[float, float]:
    """The validation loss of three packs, and again of what a run would validate on next."""
    run = build_run(Cell(Layout(layout), "dattn", "mistral", 3).config(), make_packs())
    loads = run.state.loader is not None
    validation = Validation(
        lambda: PackLoader(make_packs()[:3]) if loads else None,
        max_microbatches=5,
        seq_length=run.seq_length,
        max_skipped_fraction=0.1,
    )
    losses = validation.loss(run.state.chunks), validation.loss(run.state.chunks)
    leave()
    return losses


def test_interleaved_stages_validate_on_any_number_of_packs() -> None:
    ((expected, _),) = run_distributed(_validate, 1, "dp1")
    for losses in run_distributed(_validate, 2, "pp2xvp2"):
        assert losses == pytest.approx((expected, expected), rel=1e-5)


def _measured() -> Measured:
    before = {EMBEDDING: torch.ones(3, dtype=torch.float64), "frozen": torch.ones(2)}
    after = {EMBEDDING: before[EMBEDDING] * 1.01, "frozen": torch.ones(2)}
    return Measured([2.0, 1.5], {f"step 1, {EMBEDDING}": torch.arange(3.0)}, before, after)


def test_what_differs_is_seen() -> None:
    """Also where FP32 would hide it: a gradient that is off by 1e-8 of its largest entry."""
    expected = _measured()
    assert deviation(_measured(), expected).is_small

    found = _measured()
    found.gradients[f"step 1, {EMBEDDING}"] = torch.tensor([2e-8, 1.0, 2.0], dtype=torch.float64)
    worse = deviation(found, expected)
    assert (worse.is_small, worse.worst) == (False, f"step 1, {EMBEDDING}")
    assert math.isclose(worse.gradients, 1e-8, rel_tol=1e-6)

    for name in (EMBEDDING, "frozen"):
        found = _measured()
        found.after[name] = found.after[name] + 1e-6
        assert not deviation(found, expected).is_small
    assert deviation(found, expected).weights == math.inf, "what is frozen must not move at all"

    found = copy.deepcopy(expected)
    found.losses[1] += 1e-9
    assert not deviation(found, expected).is_small


def test_names_that_only_one_has_are_seen() -> None:
    found = _measured()
    found.after[TIED_COPY] = found.after[EMBEDDING].clone()
    assert deviation(found, _measured()).is_small, "a copy of the tied embedding"
    found.after[TIED_COPY] += 1e-12
    assert deviation(found, _measured()).worst == f"only one has {TIED_COPY}"

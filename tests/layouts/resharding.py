"""Checkpoints of one layout gone on with under another, on other numbers of ranks too.

A run is saved in its middle and trained on as it is; under another layout the checkpoint is resumed
and trained on with the same packs. Another pair of runs begins stage 3 from the weights of stage 1.
It is FP32, as training is (the distributed optimizer's state is stored so), and losses agree to
1e-6: the order of sums, after updates that are near the sign of a gradient where that is tiny.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megatron_dattn.training.run import make_checkpointer
from megatron_dattn.training.step import train_step
from tests.layouts.cells import Cell, make_packs
from tests.layouts.layout import Layout
from tests.support.distributed import run_distributed
from tests.support.training import PackLoader, build_run, leave

TOLERANCE = 1e-6
STEPS = 2  # before the checkpoint, and after it
TOKENIZER = "0" * 64


@dataclass(frozen=True, order=True)
class Move:
    """From the layout that saves to the one that goes on."""

    source: str
    target: str
    new_stage: bool = False
    """Begin stage 3 from the weights of stage 1, instead of resuming stage 3."""

    @property
    def folder(self) -> str:
        return f"{self.source}-{1 if self.new_stage else 3}"


RESUMED = (
    *(("tp2+sp", "pp2"), ("pp2", "dp2"), ("dp2", "tp2"), ("pp2+uneven", "pp2")),
    *(("tp2xpp2+sp", "dp1"), ("dp1", "tp4+sp"), ("tp4+sp", "pp4"), ("pp4", "tp2xpp2+sp")),
    *(("pp2", "pp2xvp2"), ("pp2xvp2", "tp2+sp")),
    *(("dp2+distopt", "dp4+distopt"), ("dp4+distopt", "tp2xdp2+sp+distopt")),
    *(("tp2xdp2+sp+distopt", "pp2xdp2+distopt"), ("pp2xdp2+distopt", "dp2+distopt")),
    *(("dp2", "dp2+distopt"), ("dp2+distopt", "dp2"), ("cp2", "dp2"), ("tp2", "cp2")),
    *(("cp2+distopt", "dp2+distopt"), ("dp4+distopt", "cp2xdp2+distopt")),
)
BEGUN = (
    *(("tp2+sp", "pp2xdp2+distopt"), ("pp4", "tp2+sp"), ("dp2+distopt", "dp1")),
    *(("dp1", "tp2xpp2+sp"), ("cp4", "cp2xtp2+sp")),
)
MOVES = (*(Move(*pair) for pair in RESUMED), *(Move(*pair, new_stage=True) for pair in BEGUN))


def reshard(moves: Sequence[Move] = MOVES) -> dict[Move, float]:
    """The largest relative difference of a loss from what the first layout would have come to.

    Raises:
        RankError: a checkpoint cannot be gone on with.
    """
    stays = {move: Move(move.source, move.source, move.new_stage) for move in moves}
    begun = {stay for stay in stays.values() if stay.new_stage}
    with tempfile.TemporaryDirectory(prefix="layouts-") as folder:
        expected = _on_ranks(_save, stays.values(), folder)
        losses = _on_ranks(_go_on, {*moves, *begun}, folder)
    expected |= {stay: losses[stay] for stay in begun}
    return {move: _deviation(losses[move], expected[stays[move]]) for move in moves}


def _deviation(losses: Sequence[float], expected: Sequence[float]) -> float:
    pairs = zip(losses, expected, strict=True)
    return max(abs(loss - other) / abs(other) for loss, other in pairs)


def _on_ranks(
    work: Callable[[str, list[Move]], list[list[float]]], moves: Iterable[Move], folder: str
) -> dict[Move, list[float]]:
    """Do the work for every move once, those with equally many ranks after each other."""
    by_size: dict[int, list[Move]] = defaultdict(list)
    for move in sorted(set(moves)):
        by_size[Layout(move.target).num_ranks].append(move)
    losses: dict[Move, list[float]] = {}
    for size, group in sorted(by_size.items()):
        first, *others = run_distributed(work, size, folder, group, timeout=60 + 60 * len(group))
        assert all(other == first for other in others), "ranks saw different losses"
        losses |= dict(zip(group, first, strict=True))
    return losses


def _save(folder: str, stays: list[Move]) -> list[list[float]]:
    """Train and save under each layout; the losses of the steps that come next there."""
    losses = []
    for stay in stays:
        training = _Training(stay.source, 1 if stay.new_stage else 3, f"{folder}/{stay.folder}")
        training.train(STEPS)
        training.checkpointer.save(training.run.state)
        losses.append(training.train(STEPS))
        leave()
    return losses


def _go_on(folder: str, moves: list[Move]) -> list[list[float]]:
    """Resume what each source has saved, or begin the next stage from it; the losses then."""
    losses = []
    for move in moves:
        source = f"{folder}/{move.folder}"
        training = _Training(move.target, 3, None if move.new_stage else source)
        if move.new_stage:
            training.checkpointer.load_weights(training.run.state, source)
        else:
            assert training.checkpointer.resume(training.run.state)
            assert training.run.state.progress.step == STEPS
        losses.append(training.train(STEPS))
        leave()
    return losses


class _Training:
    """A run under a layout, whose packs depend on the step alone."""

    def __init__(self, layout: str, stage: int, folder: str | None) -> None:
        config = Cell(Layout(layout), "dattn", "gemma2", stage).config(save=folder)
        self.run = build_run(config, make_packs(2 * STEPS))
        self.checkpointer = make_checkpointer(config, TOKENIZER)
        # Its place is one of ready-made packs, which cannot be dealt anew.
        self._loader: PackLoader | None = self.run.state.loader  # type: ignore[assignment]
        self.run.state.loader = None

    def train(self, steps: int) -> list[float]:
        """The losses of the next steps."""
        return [self._step() for _ in range(steps)]

    def _step(self) -> float:
        if self._loader is not None:
            self._loader.go_to(self.run.num_microbatches * self.run.state.progress.step)
        report = train_step(self.run)
        assert not report.skipped
        return report.loss

"""The training loop, and the progress bar around it."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Literal

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_dattn.errors import CheckpointError, UserError
from megatron_dattn.runtime.distributed import is_rank_0
from megatron_dattn.runtime.lost_ranks import LostRankError, named_lost_ranks
from megatron_dattn.runtime.os_errors import explain
from megatron_dattn.runtime.rank_errors import all_ranks_agree, on_all_ranks, on_first_rank
from megatron_dattn.runtime.signals import SignalWatcher
from megatron_dattn.training.exit_reason import ExitReason, NumericsError
from megatron_dattn.training.metrics import StepReport
from megatron_dattn.training.run import Run
from megatron_dattn.training.step import train_step

logger = logging.getLogger(__name__)


def train(run: Run, signals: SignalWatcher) -> ExitReason:
    """Train to the end of the stage, or until some rank is asked to stop.

    A request that came before the first step, or while a checkpoint was saved, counts as well. At
    the end nothing is being saved any more.

    Raises:
        UserError: on all ranks: the data, or the disk for checkpoints, failed.
        NumericsError: on all ranks: loss or gradients stay non-finite; nothing was saved since.
    """
    progress, last_step = run.state.progress, run.config.training.train_iters
    bar = ProgressBar(
        run.config.logging.progress_bar, first_step=progress.step, last_step=last_step
    )
    with named_lost_ranks(lambda: "the start of the run"):
        stop = signals.requested_anywhere()
    with bar, saves_finished(run):
        while progress.step < last_step and stop is None:
            with named_lost_ranks(lambda: f"iteration {progress.step + 1}"):
                report = train_step(run)
            run.metrics.record(report, progress)
            bar.advance(report.loss)
            stop_if_numbers_stay_bad(run, report)
            with named_lost_ranks(lambda: f"what follows iteration {progress.step}"):
                validate_if_due(run)
                stop, lost = signals.requested_anywhere(), ledger_failure(run)
            with named_lost_ranks(lambda: f"the save after iteration {progress.step}"):
                save_if_due(run, at_once=stop is not None, lost=lost)
    if stop is not None and progress.step < last_step:
        logger.info("%s: stopping after iteration %d", stop.name, progress.step)
        return ExitReason("signal", progress.step, stop.name)
    return ExitReason("finished", progress.step)


def stop_if_numbers_stay_bad(run: Run, report: StepReport) -> None:
    """Speak of a skipped step; give up at `optimizer.max_skipped_steps` in a row."""
    if not report.skipped:
        return
    in_a_row = run.state.progress.skipped_steps_in_a_row
    limit = run.config.optimizer.max_skipped_steps
    if is_rank_0():
        logger.warning(
            "iteration %d skipped on all ranks: loss %s, gradient norm %s (%d in a row, stops at "
            "%d)",
            report.step,
            report.loss,
            report.grad_norm,
            in_a_row,
            limit,
        )
    if in_a_row >= limit:
        raise NumericsError(
            f"loss or gradients were not finite in {in_a_row} steps in a row, up to iteration "
            f"{report.step}; lower the learning rates or look at the samples of these steps, then "
            "resume from the last checkpoint",
            report.step,
        )


def validate_if_due(run: Run) -> None:
    """Measure the validation loss every `eval_interval` steps and after the last one."""
    if run.validation is None:
        return
    step, settings = run.state.progress.step, run.config.training
    if step % settings.eval_interval == 0 or step == settings.train_iters:
        loss = run.validation.loss(run.state.chunks)
        run.state.validation = {"step": step, "loss": loss}
        run.metrics.record_validation(step, loss)


def ledger_failure(run: Run) -> UserError | None:
    """The reason why some rank's ledger cannot be written, the same on all ranks. Collective."""
    if run.config.logging.sample_ledger is None:
        return None
    reason = None if run.ledger is None else run.ledger.failure
    try:
        all_ranks_agree(reason and f"writing the sample ledger failed: {reason}")
    except UserError as error:
        return error
    return None


@contextlib.contextmanager
def saves_finished(run: Run) -> Iterator[None]:
    """Let a save that is under way end before an error does that all ranks have: its state is from
    before."""
    try:
        yield
    except (UserError, NumericsError) as error:
        if run.checkpointer is not None and not isinstance(error, LostRankError):
            with named_lost_ranks(lambda: "the end of a save"):
                try:
                    run.checkpointer.finish()
                except CheckpointError as failure:
                    if is_rank_0():
                        logger.error("%s", failure)
        raise


def save_if_due(run: Run, *, at_once: bool = False, lost: UserError | None = None) -> None:
    """Save every `save_interval` steps, after the last one, and when the run is to stop.

    All but these last ones may be written beside the steps that follow; here they go on.

    Args:
        lost: why the ledger cannot be written. If it still cannot, that ends the run: steps that
            nobody can tell of are not trained. Those that were are saved before, if possible.

    Raises:
        UserError: on all ranks: the ledger or the checkpoint could not be written.
    """
    step = run.state.progress.step
    interval = run.config.checkpoint.save_interval
    is_last = step == run.config.training.train_iters
    must_wait = at_once or lost is not None or is_last
    is_due = must_wait or (interval and step % interval == 0)
    if run.checkpointer is not None:
        run.checkpointer.advance()
    if run.checkpointer is not None and is_due:
        on_first_rank("looking after the run folder", run.describe_again)
        try:
            # Before the checkpoint exists: after a power cut the ledger would be the shorter one.
            on_all_ranks("writing the sample ledger", run.sync_ledger)
            lost = None  # by now all lines are there
        except CheckpointError as error:
            lost = error
        try:
            path = run.checkpointer.save(run.state, beside=not must_wait)
        except CheckpointError as error:
            raise error if lost is None else CheckpointError(f"{lost}; {error}") from error
        if lost is not None:
            raise type(lost)(f"{lost}; everything up to iteration {step} is saved as {path}")
    if lost is not None:
        raise lost


logger = logging.getLogger(__name__)


class ProgressBar:
    """Context manager around the training loop; log lines are printed above the bar.

    It is for somebody who watches a terminal; log files never see it.
    """

    def __init__(
        self, mode: Literal["auto", "on", "off"], *, first_step: int, last_step: int
    ) -> None:
        wanted = mode == "on" or (mode == "auto" and sys.stderr.isatty())
        self._steps = (first_step, last_step)
        self._enabled = wanted and is_rank_0()
        self._bar: tqdm | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "ProgressBar":
        if self._enabled:
            first, last = self._steps
            bar = tqdm(initial=first, total=last, unit="step", dynamic_ncols=True)
            self._bar = self._open.enter_context(bar)
            self._open.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()
        self._bar = None

    def advance(self, loss: float) -> None:
        """One step is done."""
        if self._bar is None:
            return
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        try:
            self._bar.update()
        except OSError as error:  # standard error goes to a full disk, or nowhere
            logger.warning("the progress bar ends: %s", explain(error, "standard error"))
            self._bar.disable = True

"""Runs one stage from its start to its end, whatever the end is, and writes down how it ended.

Every ending is one `ExitReason`: written into the save folder, told to torchrun, returned to the
entry script. Only what nobody foresaw goes on as the exception that it is.
"""

import logging
import signal
import time
import traceback
from pathlib import Path

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.errors import UserError
from megatron_dattn.runtime.distributed import destroy_distributed
from megatron_dattn.runtime.error_report import write_error_file
from megatron_dattn.runtime.launcher import Launch
from megatron_dattn.runtime.lost_ranks import LostRankError, named_lost_ranks, tell_of_crash
from megatron_dattn.runtime.open_files import open_files_needed, require_open_files
from megatron_dattn.runtime.rank_errors import share_refusal
from megatron_dattn.runtime.signals import SignalWatcher
from megatron_dattn.training.checks import StartChecks, check_start
from megatron_dattn.training.exit_reason import (
    FILE_NAME,
    ExitReason,
    NumericsError,
    ending_of,
    ending_of_one_rank,
    first_line,
    record_exit,
)
from megatron_dattn.training.run import join_ranks, open_run
from megatron_dattn.training.run_folder import own_run_folder
from megatron_dattn.training.run_lock import is_in_use
from megatron_dattn.training.trainer import train

logger = logging.getLogger(__name__)

_LEAVES_LAST_SECONDS = 2.0
_INTERRUPTED = "interrupted by a second SIGINT; nothing was saved since the last checkpoint"


def run_to_its_end(config: PretrainConfig, launch: Launch, signals: SignalWatcher) -> ExitReason:
    """Train one stage until it is done, asked to stop, or cannot go on. Collective.

    Args:
        signals: has been noting requests to stop since the process began.
    """
    if launch.belongs_to_parent:
        signals.watch_launcher()
    leaves_together = True
    try:
        ending = _run(config, launch, signals)
    except (UserError, NumericsError) as error:
        ending = ending_of(error)
        leaves_together = not isinstance(error, LostRankError)
    except KeyboardInterrupt:
        ending, leaves_together = ExitReason("interrupted", detail=_INTERRUPTED), False
    except Exception as error:
        tell_of_crash(f"{type(error).__name__}: {first_line(error)}")
        foreseen, leaves_together = ending_of_one_rank(error), False
        if foreseen is None:
            write_ending(config, launch, ending_of(error))
            write_error_file(launch, traceback.format_exc(), 1, shared=False)
            raise
        ending = foreseen
    if launch.rank > 0 and not ending.is_shared:
        logger.error("%s", ending.detail)  # rank 0, whose line stands for all, knows nothing of it
    write_ending(config, launch, ending)
    if leaves_together:  # else the others are in the middle of something, and would be waited for
        destroy_distributed()
        if launch.leaves_last:
            # Every node's torchrun reports its end to a store inside the first node's torchrun, and
            # asks it once more: were that one gone by then, a sound run would end in a traceback.
            time.sleep(_LEAVES_LAST_SECONDS)
    return ending


def _run(config: PretrainConfig, launch: Launch, signals: SignalWatcher) -> ExitReason:
    launch.require_no_doubt()
    _require_open_files(config, launch)
    if launch.world_size == 1 and signals.received is not None:
        return _stopped_before_the_start(signals.received)
    with named_lost_ranks(lambda: "the start of the run"):
        join_ranks(config)
        return _train_stage(config, signals)


def _train_stage(config: PretrainConfig, signals: SignalWatcher) -> ExitReason:
    steps = check_start(config)
    stop = signals.requested_anywhere()
    if stop is not None:
        return _stopped_before_the_start(stop)
    if steps is not None:
        logger.info(
            "stage %s is finished: %s holds all of its %d iterations; nothing is left to do",
            config.training.stage,
            config.checkpoint.save,
            steps,
        )
        return ExitReason("finished", steps)
    with (
        own_run_folder(config.checkpoint.save),
        named_lost_ranks(lambda: "the start of the run"),
        open_run(config) as run,
    ):
        return train(run, signals)


def _require_open_files(config: PretrainConfig, launch: Launch) -> None:
    try:
        require_open_files(open_files_needed(config.data.num_workers, launch.world_size))
    except UserError as error:
        raise share_refusal(error) if launch.world_size > 1 else error from None


def _stopped_before_the_start(stop: signal.Signals) -> ExitReason:
    logger.info("%s: stopping before the first step; there is nothing to save", stop.name)
    return ExitReason("signal", detail=stop.name)


def write_ending(config: PretrainConfig, launch: Launch, ending: ExitReason) -> None:
    """Write exit_reason.json on rank 0, or where rank 0 may be the one that is lost.

    Not into a folder that holds something else, or in which another run works: this run was
    refused, or never looked into it. A killed run's lock is no such run: without word of
    it, what ends the next start looks like one more crash.
    """
    folder = config.checkpoint.save
    if folder is None or is_in_use(folder):
        return
    may_be_lost = ending.reason in ("rendezvous", "crash") or not ending.is_shared
    if launch.rank > 0 and (not may_be_lost or (Path(folder) / FILE_NAME).exists()):
        return
    is_sure = ending.reason in ("finished", "signal", "numerics") and ending.step is not None
    if is_sure or StartChecks(config, None).save_folder_is_own():
        record_exit(folder, ending)

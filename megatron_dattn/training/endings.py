"""Runs one stage from its start to its end, whatever the end is, and leaves word of it.

Every ending is one `ExitReason`: written into the save folder, told to torchrun, returned to the
entry script. Only what nobody foresaw goes on as the exception that it is.
"""

import logging
import traceback
from pathlib import Path

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.errors import UserError
from megatron_dattn.runtime.distributed import destroy_distributed
from megatron_dattn.runtime.error_file import write_error_file
from megatron_dattn.runtime.launcher import Launch
from megatron_dattn.runtime.rendezvous import RendezvousError
from megatron_dattn.training.build import start
from megatron_dattn.training.checks import StartChecks
from megatron_dattn.training.exits import (
    FILE_NAME,
    ExitReason,
    NumericsError,
    ending_of,
    record_exit,
)
from megatron_dattn.training.run_lock import is_in_use
from megatron_dattn.training.setup import open_run, own_run_folder, prepare_run
from megatron_dattn.training.trainer import train

logger = logging.getLogger(__name__)


def run_to_its_end(config: PretrainConfig, launch: Launch) -> ExitReason:
    """Train one stage until it is done, asked to stop, or cannot go on. Collective."""
    try:
        ending = _run(config, launch)
    except (UserError, NumericsError) as error:
        ending = ending_of(error)
        if isinstance(error, RendezvousError) and not error.shared and launch.rank > 0:
            logger.error("%s", error)  # rank 0, who speaks for all, knows nothing of it
    except Exception as error:
        leave_word(config, launch, ending_of(error))
        write_error_file(launch, traceback.format_exc(), 1, shared=False)
        raise
    leave_word(config, launch, ending)
    destroy_distributed()
    return ending


def _run(config: PretrainConfig, launch: Launch) -> ExitReason:
    launch.require_no_doubt()
    start(config)
    steps = prepare_run(config)
    if steps is not None:
        logger.info(
            "stage %s is finished: %s holds all of its %d iterations; nothing is left to do",
            config.training.stage,
            config.checkpoint.save,
            steps,
        )
        return ExitReason("finished", steps)
    with own_run_folder(config.checkpoint.save), open_run(config) as run:
        return train(run)


def leave_word(config: PretrainConfig, launch: Launch, ending: ExitReason) -> None:
    """Write exit_reason.json on rank 0, or where rank 0 may be the one that is lost.

    Not into a folder that holds something else, or in which another run works: this run was
    refused, or never looked into it. A killed run's lock is no such run: without word of
    it, what ends the next start looks like one more crash.
    """
    folder = config.checkpoint.save
    if folder is None or is_in_use(folder):
        return
    may_be_lost = ending.reason in ("rendezvous", "crash")
    if launch.rank > 0 and (not may_be_lost or (Path(folder) / FILE_NAME).exists()):
        return
    is_sure = ending.reason in ("finished", "signal", "numerics")
    if is_sure or StartChecks(config, None).save_folder_is_own():
        record_exit(folder, ending)

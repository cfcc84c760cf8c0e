"""Work of one rank on a checkpoint, whose failure is one CheckpointError on all ranks.

runtime/rank_errors.py has the exchange; here are the words, and any error counts: of a bug, too,
the others must hear, as the folder that they write into together has to be cleaned up.
"""

import errno
import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch.distributed as dist

from megatron_dattn.errors import CheckpointError, OutageError, UserError
from megatron_dattn.runtime.lost_ranks import is_loss
from megatron_dattn.runtime.os_errors import explain, shortage
from megatron_dattn.runtime.rank_errors import run_on_all_ranks, run_on_first_rank

logger = logging.getLogger(__name__)


class DiskFullError(CheckpointError):
    """The disk has no room for what was to be written."""


T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_from_all(value: T) -> list[T]:
    """This value of every rank, by rank, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_every_rank(purpose: str, work: Callable[[], T]) -> T:
    """Do the work on every rank; it must not fail before its own last exchange, if it has any.

    Args:
        purpose: what the work is for, as the beginning of the error message.

    Raises:
        CheckpointError: on all ranks, if the work raised on any of them.
        OutageError: in its place, if that is what the work raised.
    """
    return run_on_all_ranks(work, partial(_refusal, purpose))


def on_first_rank(purpose: str, work: Callable[[], T]) -> T:
    """Do the work on rank 0 alone and hand its result to every rank; errors as above."""
    return run_on_first_rank(work, partial(_refusal, purpose))


def _refusal(purpose: str, error: Exception) -> UserError | None:
    if isinstance(error, OutageError):
        return error  # of a data loader whose state could not be had: another try may help
    if is_loss(error):
        return None  # the others cannot be told: it is they, or one of them, who do not answer
    return as_checkpoint_error(purpose, error)


def as_checkpoint_error(purpose: str, error: Exception) -> CheckpointError:
    """The error in the words of this package; its cause is kept.

    What no user can cause (a type error, say) is logged with its traceback as well.
    """
    if isinstance(error, CheckpointError):
        return error
    if isinstance(error, UserError):
        translated = CheckpointError(str(error))
    elif isinstance(error, OSError):
        kind = DiskFullError if error.errno == errno.ENOSPC else CheckpointError
        translated = kind(f"{purpose} failed: {explain(error)}")
    elif words := shortage(error):
        translated = CheckpointError(f"{purpose} failed: {words}")
    else:
        logger.error("%s failed", purpose, exc_info=error)
        translated = CheckpointError(f"{purpose} failed: {type(error).__name__}: {error}")
    translated.__cause__ = error
    return translated

"""Rank-local work whose failure every rank must learn of before the next collective.

A rank that meets a full disk and leaves would let the others wait in a collective until the
timeout. These helpers run the work, exchange the outcome, and raise one CheckpointError on all
ranks if it failed on any. Without a process group they run the work and translate its errors.
"""

import errno
import logging
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_dattn.errors import CheckpointError, OutageError, UserError
from megatron_dattn.runtime.distributed import all_ranks_agree
from megatron_dattn.runtime.lost_ranks import is_loss
from megatron_dattn.runtime.os_errors import explain, shortage

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
    error, result = _attempt(purpose, work)
    _share_failure(error)
    return result  # type: ignore[return-value]


def on_first_rank(purpose: str, work: Callable[[], T]) -> T:
    """Do the work on rank 0 alone and hand its result to every rank.

    Raises:
        CheckpointError: on all ranks, if the work raised.
    """
    error, result = _attempt(purpose, work) if rank() == 0 else (None, None)
    _share_failure(error)
    if world_size() > 1:
        results = [result]
        dist.broadcast_object_list(results, src=0)
        result = results[0]
    return result  # type: ignore[return-value]


def _attempt(purpose: str, work: Callable[[], T]) -> tuple[UserError | None, T | None]:
    try:
        return None, work()
    except OutageError as error:
        return error, None  # of a data loader whose state could not be had: another try may help
    except Exception as error:
        if is_loss(error):
            raise  # the others cannot be told: it is they, or one of them, who do not answer
        return as_checkpoint_error(purpose, error), None


def _share_failure(error: UserError | None) -> None:
    if world_size() == 1:
        if error is not None:
            raise error
        return
    try:
        all_ranks_agree(error)
    except CheckpointError as shared:
        raise shared from error


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

"""The one way in which an error of one rank becomes an error of all.

A rank that meets a full disk and leaves would let the others wait in a collective until the
timeout. So work that can fail on one rank alone (reading a file, writing a checkpoint) is followed
by an exchange of how it went, before the next collective. What no user can mend is raised where it
struck, as is word of a lost rank: lost_ranks.py tells the others. Of work on a run's folder
(`on_all_ranks`, `on_first_rank`) every error counts.
"""

import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from megatron_dattn.errors import CheckpointError, DiskFullError, OutageError, UserError
from megatron_dattn.runtime.distributed import (
    gather_from_all,
    host_group,
    is_rank_0,
    join_world,
    world_size,
)
from megatron_dattn.runtime.lost_ranks import is_loss
from megatron_dattn.runtime.os_errors import explain, shortage
from megatron_dattn.runtime.rendezvous import RendezvousError

logger = logging.getLogger(__name__)

T = TypeVar("T")

Refusal = Callable[[Exception], UserError | None]
"""What all ranks are to raise for an error of some work; None: it is raised on its rank alone."""


def as_user_error(error: Exception) -> UserError | None:
    """A UserError as it is; what the file system refuses counts as one: its words name the path."""
    if isinstance(error, OSError):
        return UserError(explain(error))
    return error if isinstance(error, UserError) else None


def run_on_all_ranks(work: Callable[[], T], refusal: Refusal = as_user_error) -> T:
    """Do the work on every rank; it must not fail before its own last collective, if it has any.

    Raises:
        UserError: on all ranks, as `refusal` makes it, if the work raised on any of them.
    """
    result, error = _attempt(work, refusal)
    all_ranks_agree(error)
    return cast(T, result)


def run_on_first_rank(work: Callable[[], T], refusal: Refusal = as_user_error) -> T:
    """Do the work on rank 0 alone and hand its result to every rank; errors as above."""
    result, error = _attempt(work, refusal) if is_rank_0() else (None, None)
    all_ranks_agree(error)
    if world_size() > 1:
        results = [result]
        dist.broadcast_object_list(results, src=0)
        (result,) = results
    return cast(T, result)


def on_all_ranks(purpose: str, work: Callable[[], T]) -> T:
    """`run_on_all_ranks` for work on a run's folder, where any error counts.

    Of a bug, too, the others must hear, as the folder that they write into together has to be
    cleaned up.

    Args:
        purpose: what the work is for, as the beginning of the error message.

    Raises:
        CheckpointError: on all ranks, if the work raised on any of them.
        OutageError: in its place, if that is what the work raised.
    """
    return run_on_all_ranks(work, partial(_refusal, purpose))


def on_first_rank(purpose: str, work: Callable[[], T]) -> T:
    """`run_on_first_rank` in the same way."""
    return run_on_first_rank(work, partial(_refusal, purpose))


def _refusal(purpose: str, error: Exception) -> UserError | None:
    if isinstance(error, OutageError):
        return error  # of a data loader whose state could not be had: another try may help
    if is_loss(error):
        return None  # the others cannot be told: it is they, or one of them, who do not answer
    return as_checkpoint_error(purpose, error)


def as_checkpoint_error(purpose: str, error: Exception) -> CheckpointError:
    """The error as a CheckpointError; its cause is kept.

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


@contextlib.contextmanager
def told_as(purpose: str) -> Iterator[None]:
    """Raise what goes wrong inside as a CheckpointError, as `as_checkpoint_error` makes it."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise as_checkpoint_error(purpose, error) from error


def all_ranks_agree(error: UserError | str | None) -> None:
    """Turn a failure of any rank into the same failure of all of them. Collective.

    One all-reduce of one integer between the hosts; only where that is not zero are the errors
    gathered.

    Args:
        error: what went wrong on this rank, or None.

    Raises:
        UserError: of the class given on the first failing rank, if any rank gave an error. It names
            that rank and its host, unless all ranks failed alike.
    """
    own = UserError(error) if isinstance(error, str) else error
    if world_size() == 1:
        if own is not None:
            raise own
        return
    failed = torch.tensor([int(own is not None)])
    dist.all_reduce(failed, dist.ReduceOp.SUM, group=host_group())
    if not failed.item():
        return
    answers = gather_from_all((own, socket.gethostname()))
    failures = [(rank, *answer) for rank, answer in enumerate(answers) if answer[0] is not None]
    rank, first, host = failures[0]
    assert first is not None
    if len(failures) == len(answers) and len({str(error) for _, error, _ in failures}) == 1:
        raise type(first)(str(first)) from own
    others = f" (and {len(failures) - 1} more failed)" if len(failures) > 1 else ""
    raise type(first)(f"rank {rank} (host {host}): {first}{others}") from own


def share_refusal(error: UserError) -> UserError:
    """Tell the other ranks of a mistake that this one met before it joined them.

    They wait in `join_world`, or have met the same mistake: without this call they would wait for
    this rank until the timeout.

    Returns:
        What all ranks report: the given error if the ranks cannot be told.
    """
    joins = not dist.is_initialized()
    try:
        join_world()
        all_ranks_agree(error)
    except UserError as shared:
        return error if isinstance(shared, RendezvousError) else shared
    finally:
        if joins and dist.is_initialized():
            dist.destroy_process_group()
    raise AssertionError("an error was shared")


def _attempt(work: Callable[[], T], refusal: Refusal) -> tuple[T | None, UserError | None]:
    try:
        return work(), None
    except Exception as error:
        refused = refusal(error)
        if refused is None:
            raise
        return None, refused

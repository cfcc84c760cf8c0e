"""The one way in which an error of one rank becomes an error of all.

A rank that meets a full disk and leaves would let the others wait in a collective until the
timeout. So work that can fail on one rank alone (reading a file, writing a checkpoint) is followed
by an exchange of how it went, before the next collective. What no user can mend is raised where it
struck, as is word of a lost rank: lost_ranks.py tells the others.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from megatron_dattn.errors import UserError
from megatron_dattn.runtime.distributed import host_group, is_rank_0, join_world
from megatron_dattn.runtime.os_errors import explain
from megatron_dattn.runtime.rendezvous import RendezvousError

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
    if _num_ranks() > 1:
        results = [result]
        dist.broadcast_object_list(results, src=0)
        (result,) = results
    return cast(T, result)


def all_ranks_agree(error: UserError | str | None) -> None:
    """Turn a failure of any rank into the same failure of all of them. Collective.

    One all-reduce of one integer between the hosts; only where that is not zero are the errors
    gathered.

    Args:
        error: what went wrong on this rank, or None.

    Raises:
        UserError: of the class given on the first failing rank, if any rank gave an error. It names
            that rank, unless all ranks failed alike.
    """
    own = UserError(error) if isinstance(error, str) else error
    if _num_ranks() == 1:
        if own is not None:
            raise own
        return
    failed = torch.tensor([int(own is not None)])
    dist.all_reduce(failed, dist.ReduceOp.SUM, group=host_group())
    if not failed.item():
        return
    errors: list[UserError | None] = [None] * _num_ranks()
    dist.all_gather_object(errors, own)
    failures = [(rank, error) for rank, error in enumerate(errors) if error is not None]
    rank, first = failures[0]
    if len(failures) == len(errors) and len({str(failure) for _, failure in failures}) == 1:
        raise type(first)(str(first)) from own
    others = f" (and {len(failures) - 1} more failed)" if len(failures) > 1 else ""
    raise type(first)(f"rank {rank}: {first}{others}") from own


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


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _attempt(work: Callable[[], T], refusal: Refusal) -> tuple[T | None, UserError | None]:
    try:
        return work(), None
    except Exception as error:
        refused = refusal(error)
        if refused is None:
            raise
        return None, refused

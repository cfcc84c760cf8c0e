"""Which ranks are missing when a collective fails: every other rank ends with the same answer.

gloo and NCCL know sockets, not ranks, and each rank knows only those it exchanges with. So a rank
whose collective fails reports to the store over which the ranks met, ends its connections, so that
those who wait for it learn of the loss at once, and waits a moment for the reports of the others.
Who has not reported then is missing. A healthy run pays one entry per rank at its start, the name
of its host, and nothing per step; after a loss each rank sends the store some small requests per
second, for `PATIENCE_SECONDS`.

The store lives with rank 0 (or with torchrun's agent beside it). Where it is silent, frozen or
gone, it is asked for a bounded time only, and rank 0 is the one that is named.
"""

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import psutil
import torch.distributed as dist

from megatron_dattn.errors import UserError, shortened
from megatron_dattn.runtime.rendezvous import spell_ranks

# Below the 30 s after which torchrun kills those that are left when one process has ended.
PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.1
_MAX_HOSTS, _MAX_ASKED = 4, 64
_MAX_REASON = 120

# How gloo and NCCL speak of peers that are gone. "enforce fail" is gloo's word for wrong use.
_LOSS_GLOO = re.compile(r"gloo/transport/|connectFullMesh")
_LOSS_NCCL = re.compile(
    r"time(d )?out|remote process|ncclRemoteError|ncclSystemError|communicator was aborted"
    r"|Connection (closed|reset|refused)"
)


class LostRankError(UserError):
    """A rank was killed, froze or is cut off; the others cannot go on, but start again."""


def is_loss(error: BaseException) -> bool:
    """True if this is gloo's, NCCL's or the store's way to say that a peer does not answer."""
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error)
    if isinstance(error, dist.DistBackendError):
        return _LOSS_NCCL.search(text) is not None
    is_gloo = type(error) is RuntimeError and _LOSS_GLOO.search(text) is not None
    return is_gloo and "enforce fail" not in text


def introduce_rank() -> None:
    """Leave the name of this rank's host with the process group, for those who may miss it."""
    if _has_peers():
        _group_store().set(_host_key(dist.get_rank()), socket.gethostname())


@contextlib.contextmanager
def named_lost_ranks(place: Callable[[], str]) -> Iterator[None]:
    """Turn the failure of a collective inside into one that names the missing ranks.

    Args:
        place: what this rank waited for, e.g. "iteration 7"; asked for when it fails.

    Raises:
        LostRankError: on every rank that is left, within three times `PATIENCE_SECONDS`.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not is_loss(error) or not _has_peers():
            raise
        raise LostRankError(
            f"{who_is_missing()}; rank {dist.get_rank()} on {socket.gethostname()} was waiting in "
            f"{place()} ({_reason(error)}). Look at that log and host, then start again: the "
            "newest checkpoint is resumed. parallel.distributed_timeout_minutes is how long to wait"
        ) from error


def _reason(error: BaseException) -> str:
    """gloo's first sentence, without the place in its source: advice and C++ frames follow."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return shortened(re.sub(r"^\[[^]]*\] ", "", line).split(". ")[0], _MAX_REASON)


def tell_of_crash(reason: str) -> None:
    """Let the others, who will miss this rank, know why it ends; rank 0 stays until they do."""
    if _has_peers():
        _bounded(lambda store: _Inquiry(store).end_with(reason))


def who_is_missing() -> str:
    """The ranks that have not come to this call within a moment, in words. Collective.

    Rank 0 leaves last, as the store ends with it.
    """
    answer = _bounded(lambda store: _Inquiry(store).answer())
    if answer is not None:
        return answer
    store = _tcp_store(_group_store())
    place = f" at {store.host}:{store.port}" if store else ""
    return f"rank 0{place} does not answer, nor the store there that knows the others"


def _has_peers() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _group_store() -> dist.Store:
    world = dist.group.WORLD
    assert world is not None, "the ranks have met"
    return world.get_group_store()


def _tcp_store(store: dist.Store) -> dist.TCPStore | None:
    """What is behind the prefixes; None for a store of a file or of one process, as in tests."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store if isinstance(store, dist.TCPStore) else None


def _host_key(rank: int) -> str:
    return f"host of rank {rank}"


def _bounded(ask: Callable[[dist.Store], str]) -> str | None:
    """What the store says; None if it does not answer: its calls would wait for ever."""
    answers: list[str] = []

    def work() -> None:
        with contextlib.suppress(dist.DistError, RuntimeError, OSError):
            store = _group_store()
            _require_listener(_tcp_store(store))
            answers.append(ask(store))

    asking = threading.Thread(target=work, name="lost ranks", daemon=True)
    asking.start()
    asking.join(2.5 * PATIENCE_SECONDS)
    return answers[0] if answers else None


def _require_listener(store: dist.TCPStore | None) -> None:
    """torch speaks of a store that is gone in screens of C++ frames: look first.

    Raises:
        OSError: nobody listens where the store was.
    """
    if store is not None:
        time.sleep(_POLL_SECONDS)  # a process that dies does not close everything at once
        socket.create_connection((store.host, store.port), PATIENCE_SECONDS).close()


class _Inquiry:
    """What the ranks that are left tell each other over the store."""

    def __init__(self, store: dist.Store) -> None:
        self._store, self._rank, self._size = store, dist.get_rank(), dist.get_world_size()

    def answer(self) -> str:
        """Report, wait for the others' reports, and hear what one of the ranks found."""
        self._report()
        self._wait_for(lambda: self._count("reports") >= self._size)
        if self._store.add("lost: judges", 1) == 1:
            self._store.set("lost: verdict", self._judge())
        self._store.wait(["lost: verdict"], timedelta(seconds=PATIENCE_SECONDS))
        verdict = self._store.get("lost: verdict").decode()
        self._leave(lambda: self._count("reports"))
        return verdict

    def end_with(self, reason: str) -> str:
        """Report and leave the reason, if this rank is the first that crashes."""
        here = f"rank {self._rank} on {socket.gethostname()}"
        self._store.compare_set("lost: crash", "", f"{here} ended with {reason}")
        self._report()
        self._leave(lambda: self._size)
        return ""

    def _report(self) -> None:
        self._store.set(f"lost: report of {self._rank}", "")
        self._store.add("lost: reports", 1)
        _hang_up(_tcp_store(self._store))

    def _leave(self, num_expected: Callable[[], int]) -> None:
        """The store ends with rank 0: those who come must have heard the answer before."""
        self._store.add("lost: hearers", 1)
        if self._rank == 0:
            self._wait_for(lambda: self._count("hearers") >= num_expected())

    def _count(self, name: str) -> int:
        return int(self._store.add(f"lost: {name}", 0))

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition() and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)

    def _judge(self) -> str:
        if self._store.check(["lost: crash"]):
            return self._store.get("lost: crash").decode()
        missing = self._without_report(range(self._size))
        if not missing:
            return "all ranks are there, but their connections failed or were too slow"
        verb = "does" if len(missing) == 1 else "do"
        return f"{spell_ranks(missing)}{self._hosts(missing)} {verb} not answer"

    def _without_report(self, ranks: Sequence[int]) -> list[int]:
        """By halves: of 1024 ranks that lack one, some twenty requests find it."""
        if self._store.check([f"lost: report of {rank}" for rank in ranks]):
            return []
        if len(ranks) == 1:
            return list(ranks)
        half = len(ranks) // 2
        return self._without_report(ranks[:half]) + self._without_report(ranks[half:])

    def _hosts(self, ranks: Sequence[int]) -> str:
        keys = [_host_key(rank) for rank in ranks[:_MAX_ASKED]]
        known = [self._store.get(key).decode() for key in keys if self._store.check([key])]
        hosts = list(dict.fromkeys(known))
        if not hosts:
            return ""
        more = f" and {len(hosts) - _MAX_HOSTS} more" if len(hosts) > _MAX_HOSTS else ""
        return f" on {', '.join(hosts[:_MAX_HOSTS])}{more}"


def _hang_up(store: dist.TCPStore | None) -> None:
    """End all connections but those to the store: the process is about to end anyway.

    Without this a rank that is no neighbour of the lost one would wait until its own timeout: gloo
    closes nothing before all process groups are freed.
    """
    if store is None:
        return
    for connection in psutil.Process().net_connections("tcp"):
        ports = {connection.laddr.port, connection.raddr.port if connection.raddr else store.port}
        if store.port not in ports:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as end:
                end.shutdown(socket.SHUT_RDWR)

"""How the ranks of a run find each other, and who is missed when they do not.

torch's own rendezvous is silent until its timeout and then names neither the address nor the ranks
that did not come. So the ranks first report to a store on rank 0's host: rank 0 waits for all of
them, says every half minute for whom, and its verdict is everybody's. Only then is the process
group built.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Collection, Iterator
from datetime import timedelta

import torch.distributed as dist

from megatron_dattn.errors import UserError
from megatron_dattn.runtime.launcher import Launch

logger = logging.getLogger(__name__)

REMINDER_SECONDS = 30.0
_LONGEST_PAUSE = 0.5
_HEARING_SECONDS = 10.0
_NUM_NAMED = 8
_VERDICT = "verdict"


class RendezvousError(UserError):
    """The ranks did not all meet: a host, a port or the network, which another try may mend."""

    shared = False
    """Whether rank 0 has the same error: it has told this rank of it."""


def meet(launch: Launch, timeout_seconds: float) -> dist.Store:
    """Wait until every rank of the world has come; the store over which they met.

    Args:
        timeout_seconds: how long this rank waits in all.

    Raises:
        ConfigError: the launcher has not told where to meet.
        RendezvousError: naming the address, this rank and the ranks that are missing.
    """
    host, port = launch.meeting_point()
    place = f"{host}:{port} (MASTER_ADDR, MASTER_PORT)"
    logger.info(
        "rank %d of %d, started by %s, on %s: meeting the others at %s, for up to %.0f s",
        launch.rank,
        launch.world_size,
        launch.launcher,
        socket.gethostname(),
        place,
        timeout_seconds,
    )
    watch = _Watch(timeout_seconds)
    try:
        store = _open_store(launch, host, port, watch)
        store.set(f"rank {launch.rank}", socket.gethostname())
        judge = _judge if launch.rank == 0 else _hear_verdict
        verdict = judge(launch, store, place, watch)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" in reason:
            reason = "another program listens there; set MASTER_PORT to a free port for all ranks"
        raise RendezvousError(
            f"rank {launch.rank} on {socket.gethostname()} could not meet the other "
            f"{launch.world_size - 1} ranks at {place}: {reason}"
        ) from error
    if verdict:
        shared = RendezvousError(verdict)
        shared.shared = True
        raise shared
    return dist.PrefixStore("run", store)


class _Watch:
    """The time that is left, and pauses that grow while nothing happens."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._reminder = time.monotonic() + REMINDER_SECONDS

    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def pauses(self) -> Iterator[None]:
        """Come back after ever longer pauses, until the time is up."""
        pause = 0.005
        while self.left() > 0:
            yield
            time.sleep(min(pause, self.left()))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def reminds(self) -> bool:
        """Whether it is time to say that this rank still waits."""
        if time.monotonic() < self._reminder:
            return False
        self._reminder = time.monotonic() + REMINDER_SECONDS
        return True


def _open_store(launch: Launch, host: str, port: int, watch: _Watch) -> dist.Store:
    """Rank 0 makes the store, unless torchrun's agent has; the others wait for it to answer."""
    makes_it = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    if not makes_it:
        _wait_for_answer(launch, host, port, watch)
    # torch would repeat a connection's failures in screens of C++ frames: those that can be
    # foreseen were met above.
    store = dist.TCPStore(
        host,
        port,
        launch.world_size,
        is_master=makes_it,
        timeout=timedelta(seconds=max(1.0, watch.left())),
        wait_for_workers=False,
    )
    # torchrun keeps its store when it restarts the ranks.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"meeting {attempt}", store)


def _wait_for_answer(launch: Launch, host: str, port: int, watch: _Watch) -> None:
    problem = ""
    for _ in watch.pauses():
        try:
            with contextlib.closing(socket.create_connection((host, port), min(5.0, watch.left()))):
                return
        except OSError as error:
            problem = str(error)
        if watch.reminds():
            logger.warning("no answer from %s:%d yet: %s", host, port, problem)
    raise RendezvousError(
        f"rank {launch.rank} on {socket.gethostname()} got no answer from rank 0 at {host}:{port} "
        f"in {watch.seconds:.0f} s ({problem}): is MASTER_ADDR its host, MASTER_PORT open, and "
        "rank 0 alive? parallel.rendezvous_timeout_minutes is how long to wait"
    )


def _judge(launch: Launch, store: dist.Store, place: str, watch: _Watch) -> str:
    """Wait for all ranks, on rank 0; the verdict, empty if they came, is told to all who did."""
    missing = set(range(launch.world_size))
    for _ in watch.pauses():
        missing = {rank for rank in missing if not store.check([f"rank {rank}"])}
        if not missing:
            break
        if watch.reminds():
            logger.warning("still waiting for %s at %s", spell_ranks(missing), place)
    verdict = ""
    if missing:
        verdict = (
            f"{spell_ranks(missing)} of {launch.world_size} did not come to {place} in "
            f"{watch.seconds:.0f} s, where rank 0 on {socket.gethostname()} waited: look at their "
            "logs and hosts; parallel.rendezvous_timeout_minutes is how long to wait"
        )
    store.set(_VERDICT, verdict)
    if verdict:
        _wait_for_hearers(store, set(range(1, launch.world_size)) - missing)
    return verdict


def _wait_for_hearers(store: dist.Store, ranks: set[int]) -> None:
    """The store ends with rank 0: those who came must have read the verdict before."""
    for _ in _Watch(_HEARING_SECONDS).pauses():
        ranks = {rank for rank in ranks if not store.check([f"heard by {rank}"])}
        if not ranks:
            return


def _hear_verdict(launch: Launch, store: dist.Store, place: str, watch: _Watch) -> str:
    """What rank 0 says, which may have come at the last moment and begun to wait only then."""
    for _ in _Watch(watch.seconds + watch.left()).pauses():
        if store.check([_VERDICT]):
            verdict = store.get(_VERDICT).decode()
            store.set(f"heard by {launch.rank}", "")
            return verdict
    raise RendezvousError(
        f"rank {launch.rank} on {socket.gethostname()} came to {place}, but rank 0 does not say "
        "whether all are there: look at its log and host"
    )


def spell_ranks(ranks: Collection[int]) -> str:
    """The first few of them by number, and how many more there are."""
    named = ", ".join(map(str, sorted(ranks)[:_NUM_NAMED]))
    more = f" and {len(ranks) - _NUM_NAMED} more" if len(ranks) > _NUM_NAMED else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {named}{more}"

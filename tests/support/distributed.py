"""Runs a function on several gloo ranks, for tests of everything that communicates.

A fork server with torch and megatron-core in memory starts the ranks, so one costs well under a
second. They meet through a file, not a port. A failing or hanging rank ends them all, and its
traceback (or, for a hang, every rank's stack) is what the test shows.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STACKS_SIGNAL = signal.SIGUSR2

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preload"])


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback and output."""


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120
) -> list[Any]:
    """Call `fn(*args)` on `world_size` ranks with the CPU runtime and a gloo process group.

    `fn` must be importable (top level of its module); arguments and return values are pickled. The
    ranks see RANK, LOCAL_RANK and WORLD_SIZE; model-parallel groups are the function's business.

    Returns:
        The return values, by rank. What the ranks printed is printed again.

    Raises:
        RankError: if any rank fails, or they need longer than `timeout` seconds.
    """
    payload = pickle.dumps((fn, args))  # plain pickle: no tensors in shared memory
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = [_Rank(r, world_size, payload, Path(folder), timeout) for r in range(world_size)]
        try:
            return _collect(ranks, timeout)
        finally:
            for rank in ranks:
                rank.end()
            for rank in ranks:
                print(rank.output(), end="")


def fork_server_process(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Start a process that calls `target(*args)` with everything heavy in memory already."""
    process = _context.Process(target=target, args=args)
    with _fork_server_environment():
        process.start()
    return process


class _Rank:
    """One rank as its parent sees it."""

    def __init__(
        self, rank: int, world_size: int, payload: bytes, folder: Path, timeout: float
    ) -> None:
        self.rank = rank
        self._log = folder / f"rank-{rank}.log"
        self.results, theirs = _context.Pipe()
        self.process = fork_server_process(
            _run_rank, rank, world_size, payload, str(folder), str(self._log), timeout, theirs
        )
        theirs.close()

    def output(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def show_stack(self) -> None:
        if self.process.is_alive() and self.process.pid:
            os.kill(self.process.pid, STACKS_SIGNAL)

    def end(self) -> None:
        """End the rank and whatever it started: data workers would outlive it."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # if it had no time to found its group
        self.process.join()
        self.results.close()


def _collect(ranks: list[_Rank], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    values: dict[int, Any] = {}
    waiting = {rank.results: rank for rank in ranks}
    while waiting:
        ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            for rank in waiting.values():
                rank.show_stack()
            time.sleep(0.5)
            stacks = "".join(f"\n--- rank {r.rank}\n{r.output()}" for r in waiting.values())
            raise RankError(f"no answer after {timeout} s from {len(waiting)} ranks{stacks}")
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[call-overload]
            values[rank.rank] = _value_of(rank)
    return [values[rank] for rank in range(len(ranks))]


def _value_of(rank: _Rank) -> Any:
    try:
        succeeded, value = pickle.loads(rank.results.recv_bytes())
    except EOFError:
        rank.process.join()
        code = rank.process.exitcode
        raise RankError(f"rank {rank.rank} died, exit code {code}\n{rank.output()}") from None
    if not succeeded:
        raise RankError(f"rank {rank.rank} failed\n{value}\n{rank.output()}")
    return value


@contextlib.contextmanager
def _fork_server_environment() -> Iterator[None]:
    """What the fork server must find in its environment when the first rank starts it."""
    wanted = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    wanted["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    former = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _run_rank(
    rank: int,
    world_size: int,
    payload: bytes,
    folder: str,
    log: str,
    timeout: float,
    results: connection.Connection,
) -> None:
    os.setpgid(0, 0)
    redirect_output(log)
    # As pyproject.toml has it for the process of the tests.
    warnings.filterwarnings("error", module=r"(megatron_dattn|tools|examples|benchmarks)\b")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    # Gloo would otherwise look up this machine's name, which not every sandbox can.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        answer = True, _call(rank, world_size, payload, folder, timeout)
        message = pickle.dumps(answer)
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    sys.stdout.flush()
    results.send_bytes(message)
    # Leaving now would break the connections of peers that still work, and hide the first failure
    # behind theirs: stay until the parent has heard everybody (or is gone).
    with contextlib.suppress(EOFError):
        results.recv_bytes()
    os._exit(0)


def _call(rank: int, world_size: int, payload: bytes, folder: str, timeout: float) -> Any:
    import torch
    import torch.distributed as dist

    from megatron_dattn.runtime.cpu import enable_cpu_runtime

    torch.set_num_threads(1)
    enable_cpu_runtime()
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    fn, args = pickle.loads(payload)
    return fn(*args)


def redirect_output(log: str) -> None:
    """Append to a file: the fork server's streams belong to whichever test started it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.register(STACKS_SIGNAL, file=sys.stderr, all_threads=False)

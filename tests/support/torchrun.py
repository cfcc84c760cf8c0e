"""torchrun with `pretrain_vlm.py`, in processes that have everything heavy in memory already.

The launcher is forked from the test fork server and forks its ranks (`--run-path`, torchrun's own
option for a script that runs in the interpreter it is given): launcher, agent, ranks, signals and
exit codes are the real ones, but for the seconds in which each process would import torch and
megatron-core. Tests of those seconds, and of torchrun's command line, start new interpreters.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from tests.support.distributed import fork_server_process, redirect_output

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def torchrun(flags: list[str], *, ranks: int, log: Path) -> Iterator[BaseProcess]:
    """A launcher in a session of its own; what it and its ranks say is appended to a file.

    At the end of the block whatever still runs of it is killed.
    """
    launcher = fork_server_process(_launch, flags, ranks, str(log))
    assert launcher.pid is not None
    try:
        yield launcher
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.kill()  # if it had no time to found its session
        launcher.join()


def ranks_of(launcher: BaseProcess) -> list[psutil.Process]:
    """The ranks, in order: torchrun starts them one after the other."""
    assert launcher.pid is not None
    children = psutil.Process(launcher.pid).children()
    return sorted(children, key=lambda child: (child.create_time(), child.pid))


def _launch(flags: list[str], ranks: int, log: str) -> None:
    from torch.distributed.run import main

    os.setsid()
    redirect_output(log)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    launcher = ["--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "localhost:0", "--run-path", "--start-method", "fork"]
    sys.argv[:] = ["torchrun", *launcher, str(ROOT / "pretrain_vlm.py"), *flags]
    main()

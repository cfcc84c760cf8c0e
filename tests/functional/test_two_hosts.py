"""A job of two hosts with a network between them: trained, cut apart in mid-step, and resumed.

Real network devices, addresses, rendezvous and host names (tests/support/hosts.py); only Slurm's
commands are stand-ins.
"""

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts import ADDRESSES, DEVICE, NAMES, Hosts, gives_namespaces, two_hosts
from tests.support.slurm import Cluster, newest_step, start_attempt, wait_for, write_recipe

TRAIN_ITERS = 400
TIMEOUT_SECONDS = 10
# Then asks who is missing (three times 10 s at most), and torchrun ends what is left on its host.
ENDS_WITHIN_SECONDS = TIMEOUT_SECONDS + 60


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if not gives_namespaces():
        pytest.skip("this system gives its users no namespaces (unshare --user --net)")
    with two_hosts() as both:
        yield both


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, real_torchrun=True)
    write_recipe(tmp_path)
    yield cluster
    cluster.close()


def start(cluster: Cluster, hosts: Hosts, attempt: int) -> subprocess.Popen[bytes]:
    arguments = ["--training.train_iters", str(TRAIN_ITERS)]
    arguments += ["--parallel.distributed_timeout_minutes", str(TIMEOUT_SECONDS / 60)]
    variables = {
        "HOST_NAMES": "\n".join(ADDRESSES),
        "GLOO_SOCKET_IFNAME": DEVICE,  # there is no name server to look the host's name up
        "GRACE_SECONDS": "5",
        **{f"ENTER_NODE_{node}": " ".join(enter) for node, enter in enumerate(hosts.enter)},
    }
    return start_attempt(cluster, attempt, *arguments, **variables)


def test_two_hosts_that_are_cut_apart(cluster: Cluster, hosts: Hosts) -> None:
    """Tensor parallel across the cable: every layer of every step waits for both."""
    stage = cluster.folder / "checkpoints" / "recipe" / "stage1"
    job = start(cluster, hosts, 0)
    assert wait_for(lambda: newest_step(stage) >= 20, job), cluster.log()
    assert "2 ranks on 2 hosts: sums over their groups are right" in cluster.log()

    hosts.cut()
    cut_at = time.monotonic()
    assert job.wait(timeout=240) == 75, cluster.log()
    seconds = time.monotonic() - cut_at
    assert seconds < ENDS_WITHIN_SECONDS, cluster.log()
    log = cluster.log()
    # A save goes on for a moment on one rank after the other has seen its checkpoint.
    place = r"(?:iteration|what follows iteration|the save after iteration) \d+ \("
    words = (
        r"(rank [01] (?:on|at) \S+) does not answer.*; (rank [01] on \S+) was waiting in " + place
    )
    ranks = [f"rank {rank} on {name}" for rank, name in enumerate(NAMES)]
    # The second host cannot ask what the store knows, which is behind the cable too.
    (port,) = set(re.findall(r"meeting at \S+:(\d+),", log))
    there = f"rank 0 at {ADDRESSES[0]}:{port}"
    assert set(re.findall(words, log)) == {(ranks[1], ranks[0]), (there, ranks[1])}
    assert cluster.exit_reason(stage)["reason"] == "lost_rank"
    assert cluster.noted("scontrol") == ["requeue 12345"]

    hosts.mend()
    before, step = len(log), newest_step(stage)
    assert start(cluster, hosts, 1).wait(timeout=240) == 0, cluster.log()
    assert f"iteration {step + 1:3d}/{TRAIN_ITERS} |" in cluster.log()[before:]
    assert cluster.exit_reason(stage)["reason"] == "finished"

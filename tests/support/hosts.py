"""Two hosts on one machine, with a cable between them that can be cut.

A host is a namespace of the kernel with network devices and a host name of its own, held by a
process that sleeps; what runs in it shares the file system with everything else. They are made in a
user namespace, which needs no rights where the system allows these to users.
"""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NAMES = ("node-a", "node-b")
ADDRESSES = ("10.0.0.1", "10.0.0.2")
DEVICE = "eth0"
_OWN = ("--net", "--uts")
_UNSHARE = ("unshare", "--user", "--map-root-user", *_OWN)


@dataclass(frozen=True)
class Hosts:
    """`enter[n]` before a command lets it run on host n."""

    enter: tuple[list[str], list[str]]

    def cut(self) -> None:
        """Cut the cable: what is sent from now on is lost, and nobody is told."""
        _run(self.enter[1], "ip", "link", "set", DEVICE, "down")

    def mend(self) -> None:
        _run(self.enter[1], "ip", "link", "set", DEVICE, "up")


def gives_namespaces() -> bool:
    """Whether this system lets this user make hosts: some containers do not."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return subprocess.run([*_UNSHARE, "true"], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts that reach each other; they end with the block, what runs on them does not."""
    with contextlib.ExitStack() as stack:
        first = _sleeper(stack, _UNSHARE)
        joined = ["nsenter", "--target", str(first), "--user", "--preserve-credentials"]
        second = _sleeper(stack, [*joined, "unshare", *_OWN])
        hosts = Hosts((_enter(first), _enter(second)))
        pair = ("peer", "name", DEVICE, "netns", str(second))
        _run(hosts.enter[0], "ip", "link", "add", DEVICE, "type", "veth", *pair)
        for enter, name, address in zip(hosts.enter, NAMES, ADDRESSES, strict=True):
            _run(enter, "hostname", name)
            _run(enter, "ip", "address", "add", f"{address}/24", "dev", DEVICE)
            _run(enter, "ip", "link", "set", "lo", "up")
            _run(enter, "ip", "link", "set", DEVICE, "up")
        yield hosts


def _sleeper(stack: contextlib.ExitStack, namespaces: Sequence[str]) -> int:
    """A process in new namespaces, once it is there; all three programs replace each other."""
    command = [*namespaces, "sh", "-c", "echo there; exec sleep infinity"]
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
    stack.callback(process.kill)
    assert process.stdout is not None
    assert process.stdout.readline() == b"there\n", command
    return process.pid


def _enter(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--user", "--preserve-credentials", *_OWN]


def _run(enter: Sequence[str], *command: str) -> None:
    subprocess.run([*enter, *command], check=True, capture_output=True)

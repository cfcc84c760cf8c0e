"""Ranks meet over a real socket, and those that do not are named, soon and in one line."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_dattn.errors import ConfigError
from megatron_dattn.runtime import rendezvous
from megatron_dattn.runtime.launcher import Launch
from megatron_dattn.runtime.rendezvous import RendezvousError, meet


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launches(world_size: int) -> list[Launch]:
    first = Launch("a test", 0, world_size, 0, "127.0.0.1", free_port())
    return [replace(first, rank=rank, local_rank=rank) for rank in range(world_size)]


def outcome(launch: Launch, seconds: float, kept: list[dist.Store] | None = None) -> str:
    """The name of the error and its words, or "met" if the ranks then hear of each other.

    Args:
        kept: holds the store, which ends with rank 0's.
    """
    try:
        store = meet(launch, seconds)
    except RendezvousError as error:
        return f"RendezvousError: {error}"
    if kept is not None:
        kept.append(store)
    store.set(str(launch.rank), "here")
    for rank in range(launch.world_size):
        store.wait([str(rank)], timedelta(seconds=20))
    return "met"


def outcomes(there: list[Launch], seconds: float) -> list[str]:
    """Of threads: waiting releases the interpreter."""
    kept: list[dist.Store] = []
    with ThreadPoolExecutor(len(there)) as pool:
        return list(pool.map(lambda launch: outcome(launch, seconds, kept), there))


def test_all_come() -> None:
    assert outcomes(launches(3), 60) == ["met"] * 3


def test_missing_ranks_are_named_to_all_who_came(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "REMINDER_SECONDS", 0.5)
    everybody = launches(4)
    port = everybody[0].port
    with caplog.at_level("INFO"):
        said = outcomes([everybody[0], everybody[2]], 5.0)
    assert said[0] == said[1]
    assert said[0].startswith(
        f"RendezvousError: ranks 1, 3 of 4 did not come to 127.0.0.1:{port} (MASTER_ADDR, "
        "MASTER_PORT) in 5 s"
    )
    assert "\n" not in said[0]
    assert len(said[0]) < 400
    assert f"meeting the others at 127.0.0.1:{port}" in caplog.messages[0], "before the wait"
    assert any(line.startswith("still waiting for ranks 1, 3 at") for line in caplog.messages)


def test_no_answer_from_rank_0(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "REMINDER_SECONDS", 0.3)
    launch = launches(2)[1]
    started = time.monotonic()
    said = outcome(launch, 3.0)
    assert time.monotonic() - started < 20
    assert f"rank 1 on {socket.gethostname()} got no answer from rank 0 at 127.0.0.1" in said
    assert "rendezvous_timeout_minutes" in said
    assert any(line.startswith("no answer from 127.0.0.1") for line in caplog.messages)


def test_an_unknown_host() -> None:
    launch = replace(launches(2)[1], address="no-such-host.invalid")
    said = outcome(launch, 0.5)
    assert "no answer from rank 0 at no-such-host.invalid" in said
    assert "\n" not in said


def test_a_port_that_is_taken() -> None:
    launch = launches(2)[0]
    with socket.socket() as other:
        other.bind(("0.0.0.0", launch.port))
        other.listen()
        said = outcome(launch, 5.0)
    assert "another program listens there; set MASTER_PORT to a free port" in said
    assert "rank 0" in said
    assert "\n" not in said


def test_a_launcher_that_names_no_place() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        meet(replace(launches(2)[0], address=None), 1.0)


def test_rank_0_dies_while_others_wait() -> None:
    """Its store closes with it."""
    first, second = launches(2)
    store = dist.TCPStore(
        first.address, first.port, 2, True, timedelta(seconds=30), wait_for_workers=False
    )
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(outcome, second, 60)
        while not store.check(["meeting 0/rank 1"]):
            time.sleep(0.01)
        del store
        said = waiting.result(timeout=30)
    assert said.startswith("RendezvousError: rank 1 on ")
    assert "could not meet the other 1 ranks" in said
    assert "\n" not in said

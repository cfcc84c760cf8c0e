"""Seconds of a cluster by hand: what NVLink carries, what the adapters of a node carry together."""

import pytest

from megatron_dattn.planner.hardware import GPUS, Assumptions, Cluster, bf16_peak

EXACT = Assumptions(1.0, 1.0, 1.0, 1.0, launch_seconds=0.0, hop_seconds=0.0)
H100 = Cluster(GPUS["h100"], assumed=EXACT)


@pytest.mark.parametrize("name", GPUS)
def test_planned_and_detected_gpus_have_one_peak(name: str) -> None:
    assert bf16_peak(f"NVIDIA {name.upper()} 80GB") == GPUS[name].bf16


def test_bandwidth_of_a_ring_is_that_of_its_narrowest_link() -> None:
    gigabyte = 1e9
    assert H100.ring(gigabyte, ranks=8) == pytest.approx(1 / 450)
    assert H100.ring(gigabyte, ranks=1) == 0.0
    # Sixteen neighbours: eight adapters of a node, 400 GB/s together.
    assert H100.ring(gigabyte, ranks=16) == pytest.approx(1 / 400)
    # One rank of every node, or two of them.
    assert H100.ring(gigabyte, ranks=4, stride=8) == pytest.approx(1 / 50)
    assert H100.ring(gigabyte, ranks=4, stride=4) == pytest.approx(1 / 100)


def test_messages_cost_their_hops() -> None:
    cluster = Cluster(GPUS["h100"], assumed=Assumptions(hop_seconds=1.0))
    assert cluster.ring(0, ranks=8, calls=3) == 21.0
    assert cluster.send(0, distance=8) == 1.0


def test_sends_within_a_node_take_nvlink() -> None:
    assert H100.send(1e9, distance=4) == pytest.approx(1 / 450)
    assert H100.send(1e9, distance=8) == pytest.approx(1 / 50)


def test_efficiency_divides_the_peak() -> None:
    half = Cluster(GPUS["a100"], assumed=Assumptions(products=0.5))
    assert half.products(312e12) == pytest.approx(2.0)

"""Machines that add wrongly end a run; odd clocks and slow devices are named."""

import dataclasses
import logging
import os
import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dattn.errors import UserError
from megatron_dattn.runtime.distributed import initialize_distributed
from megatron_dattn.training.preflight import _Machine, check_machines, find_oddities
from tests.support.distributed import run_distributed

SOUND = [_Machine(f"node-{rank // 2}", 1e9, "H100", 0.01) for rank in range(8)]


def with_odd(rank: int, **changes: Any) -> list[_Machine]:
    machines = list(SOUND)
    machines[rank] = dataclasses.replace(machines[rank], **changes)
    return machines


def test_sound_machines_are_not_spoken_of() -> None:
    assert find_oddities(SOUND) == []
    assert find_oddities(with_odd(3, clock=1e9 + 4.0, product_seconds=0.012)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clock": 1e9 - 61.0}, "clocks differ from the others'.*node-1.*by -61 s; set them by"),
        ({"product_seconds": 0.02}, "slower than the median.*node-1.* takes 2.00 times as long"),
        ({"device": "A100"}, "other devices than the rest, which have H100: .*node-1.* has A100"),
    ],
)
def test_an_odd_machine_is_named(changes: dict[str, Any], words: str) -> None:
    (line,) = find_oddities(with_odd(3, **changes))
    assert re.search(words, line)
    assert "rank 3 (host node-1)" in line


def test_only_some_of_many_odd_machines_are_named() -> None:
    machines = [
        _Machine(f"node-{rank}", 1e9 + 100 * (rank > 19), "H100", 0.01) for rank in range(39)
    ]
    (line,) = find_oddities(machines)
    assert "rank 27 (host node-27)" in line
    assert "rank 28 " not in line
    assert "and 11 more" in line


def lines_with_a_clock_ahead(seconds: float) -> list[str]:
    """What rank by rank is logged where rank 1's clock is ahead."""
    initialize_distributed(tensor_model_parallel_size=2)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_dattn.training.preflight")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    if dist.get_rank() == 1:
        now = time.time
        time.time = lambda: now() + seconds  # type: ignore[assignment]
    check_machines()
    return lines


def test_what_is_said_of_real_ranks_is_said_once() -> None:
    (line,), *others = run_distributed(lines_with_a_clock_ahead, 4, 0.0)
    assert line.startswith("4 ranks on 1 host: sums over their groups are right, clocks within ")
    assert others == [[]] * 3
    (warning, line), *others = run_distributed(lines_with_a_clock_ahead, 4, 100.0)
    assert "rank 1 (host " in warning
    assert "by +100 s" in warning
    assert re.search(r"clocks within (99|100|101)\.", line)
    assert others == [[]] * 3


def check_where_rank_2_adds_wrongly() -> str:
    """As a broken card does: one bit of what arrives, and on that rank only."""
    initialize_distributed(tensor_model_parallel_size=2)
    reduce = dist.all_reduce

    def broken(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        done = reduce(tensor, *arguments, **options)
        if tensor.numel() > 2**16 and int(os.environ["RANK"]) == 2:
            tensor[12345] ^= 1 << 7
        return done

    dist.all_reduce = broken
    with pytest.raises(UserError) as caught:
        check_machines()
    return str(caught.value)


def test_a_rank_where_sums_come_out_wrong_is_named_to_all() -> None:
    (message, *others) = run_distributed(check_where_rank_2_adds_wrongly, 4)
    assert others == [message] * 3
    assert re.match(r"rank 2 \(host .+\): a sum over all ranks \(ranks 0, 1, 2, 3\)", message)
    assert "Start without it" in message

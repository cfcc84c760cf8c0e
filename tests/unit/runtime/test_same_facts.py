"""Ranks that were started differently: one error that names field, rank, host and values."""

from typing import Any

import pytest

from megatron_dattn.errors import ConfigError
from megatron_dattn.runtime.same_facts import all_ranks_have_same, describe_differences
from tests.support.distributed import run_distributed

COMMON = {"optimizer.learning_rates.adapter": 1e-3, "training.seed": 1234, "versions.torch": "2.13"}


def compare(changes: dict[int, dict[str, Any]]) -> str | None:
    import torch.distributed as dist

    try:
        all_ranks_have_same({**COMMON, **changes.get(dist.get_rank(), {})})
    except ConfigError as error:
        return str(error)
    return None


def test_equal_facts_pass() -> None:
    assert run_distributed(compare, 2, {}) == [None, None]


def test_one_rank_that_differs_is_named_on_all_ranks() -> None:
    said = run_distributed(compare, 3, {1: {"optimizer.learning_rates.adapter": 0.5}})
    assert len(set(said)) == 1
    assert "optimizer.learning_rates.adapter is 0.5 on rank 1 (host " in said[0]
    assert "0.001 on ranks 0, 2 (host " in said[0]


def facts_of(*changes: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"node{rank}", {**COMMON, **change}) for rank, change in enumerate(changes)]


def test_of_two_ranks_the_first_counts_as_the_rule() -> None:
    said = describe_differences(facts_of({}, {"training.seed": 7}))
    assert "training.seed is 7 on rank 1 (host node1), 1234 on rank 0 (host node0)" in said


def test_a_field_that_one_rank_lacks_is_named() -> None:
    assert "data.pack is no value on rank 1" in describe_differences(
        facts_of({"data.pack": 1}, {}, {"data.pack": 1})
    )


def test_long_values_differ_visibly_and_the_line_stays_short() -> None:
    long = {f"field{number}": "x" * 10_000 for number in range(50)}
    changed = {name: value + "y" for name, value in long.items()}
    said = describe_differences(facts_of(long, changed))
    assert len(said) < 1000
    assert "47 more fields differ" in said
    first, second = said.split("field0 is ")[1].split(" on rank 1")[0], said.split("), ")[1]
    assert first.split("(")[1][:8] != second.split("(")[1][:8]


@pytest.mark.parametrize("num_ranks", [1024])
def test_many_ranks_are_counted_not_listed(num_ranks: int) -> None:
    changes: list[dict[str, Any]] = [{} for _ in range(num_ranks)]
    changes[700] = {"training.seed": 8}
    said = describe_differences(facts_of(*changes))
    assert "training.seed is 8 on rank 700 (host node700)" in said
    assert "1023 ranks, 0 first (1023 hosts, node0 first)" in said
    assert len(said) < 400

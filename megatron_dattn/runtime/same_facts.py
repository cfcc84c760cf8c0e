"""Comparison of what must be the same on every rank: settings, versions, data.

A rank that was started with another learning rate trains along without a word: its gradients are
averaged with the others', and nothing looks wrong. So every rank states its facts, and the ranks
compare them before anything is built. The common case costs one all-reduce of a few integers,
whatever the number of ranks; only where the facts differ are they gathered, to name the field.
"""

import hashlib
import json
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_dattn.errors import ConfigError
from megatron_dattn.runtime.distributed import get_device

Facts = Mapping[str, Any]
"""Name of a field -> its value, of types that JSON knows."""

_MAX_FIELDS = 3
_MAX_VALUE_LENGTH = 80
_MAX_RANKS = 8


def all_ranks_have_same(facts: Facts) -> None:
    """Compare facts over the world. Collective.

    Raises:
        ConfigError: on all ranks, if any fact of any rank differs. It names fields, ranks, hosts
            and values.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if _all_equal(_digest(facts)):
        return
    everyone: list[tuple[str, Facts]] = [("", {})] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), dict(facts)))
    raise ConfigError(describe_differences(everyone))


def _digest(facts: Facts) -> bytes:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).digest()


def _all_equal(digest: bytes) -> bool:
    """Whether every rank has this digest: the maximum of x and of -x shows it in one reduction."""
    pieces = torch.tensor(list(digest), dtype=torch.int32, device=get_device())
    both = torch.cat((pieces, -pieces))
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return bool(torch.equal(both[: len(pieces)], -both[len(pieces) :]))


def describe_differences(everyone: Sequence[tuple[str, Facts]]) -> str:
    """One line on the fields in which ranks differ.

    Args:
        everyone: host and facts of each rank, by rank.
    """
    names = dict.fromkeys(name for _, facts in everyone for name in facts)  # in order, once each
    differing = {name: groups for name in names if len(groups := _groups(everyone, name)) > 1}
    assert differing, "facts of different digests differ in a field"
    shown = [
        _describe_field(name, groups, everyone)
        for name, groups in list(differing.items())[:_MAX_FIELDS]
    ]
    left = len(differing) - len(shown)
    more = f"; {left} more fields differ" if left else ""
    return (
        f"ranks were started differently: {'; '.join(shown)}{more}. Start all ranks with the same "
        "command, files and packages"
    )


def _groups(everyone: Sequence[tuple[str, Facts]], name: str) -> list[tuple[str, list[int]]]:
    """The values of a field with their ranks: the value of fewest ranks first."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, (_, facts) in enumerate(everyone):
        ranks[_spelled(facts[name]) if name in facts else "no value"].append(rank)
    # Of two equal groups rank 0's counts as the rule and stands last.
    return sorted(ranks.items(), key=lambda group: (len(group[1]), -group[1][0]))


def _describe_field(
    name: str, groups: Sequence[tuple[str, list[int]]], everyone: Sequence[tuple[str, Facts]]
) -> str:
    (odd, odd_ranks), (common, common_ranks) = groups[0], groups[-1]
    others = f" ({len(groups) - 2} more values)" if len(groups) > 2 else ""
    return (
        f"{name} is {odd} on {_describe_ranks(odd_ranks, everyone)}, "
        f"{common} on {_describe_ranks(common_ranks, everyone)}{others}"
    )


def _describe_ranks(ranks: Sequence[int], everyone: Sequence[tuple[str, Facts]]) -> str:
    hosts = list(dict.fromkeys(everyone[rank][0] for rank in ranks))
    host = f"host {hosts[0]}" if len(hosts) == 1 else f"{len(hosts)} hosts, {hosts[0]} first"
    if len(ranks) == 1:
        return f"rank {ranks[0]} ({host})"
    if len(ranks) > _MAX_RANKS:
        return f"{len(ranks)} ranks, {ranks[0]} first ({host})"
    return f"ranks {', '.join(map(str, ranks))} ({host})"


def _spelled(value: Any) -> str:
    text = json.dumps(value, default=str)
    if len(text) <= _MAX_VALUE_LENGTH:
        return text
    # Long values that differ behind the cut must not look alike.
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text[: _MAX_VALUE_LENGTH - 14]}... ({digest})"

"""Declarative maps between Hugging Face and Megatron parameter names.

A family (Mistral, SigLIP; see `families.py`) is a list of `Rule`s. A rule names one Megatron
parameter, the Hugging Face tensors it is made of with their shapes, and the `Layout` that joins
them; the same layout splits the parameter again, so one map serves both directions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dattn.conversion.io.hf_folder import some
from megatron_dattn.errors import CheckpointError


class Layout(Protocol):
    """How several Hugging Face tensors lie inside one Megatron parameter."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The parameter [rows, ...] of these tensors [rows of each, ...], of their dtype."""
        ...

    def split(self, whole: Tensor) -> list[Tensor]:
        """The tensors [rows of each, ...] that `join` made the parameter [rows, ...] of; same
        dtype."""
        ...


@dataclass(frozen=True)
class Same(Layout):
    """One tensor, unchanged."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        (part,) = parts
        return part

    def split(self, whole: Tensor) -> list[Tensor]:
        return [whole]


@dataclass(frozen=True)
class Stacked(Layout):
    """Equal blocks below each other: gate and up projection of a gated MLP."""

    count: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=0)

    def split(self, whole: Tensor) -> list[Tensor]:
        return list(whole.chunk(self.count, dim=0))


@dataclass(frozen=True)
class PaddedVocabulary(Layout):
    """One matrix with rows of zeros behind its own: a vocabulary that is padded.

    Args:
        more: rows of zeros behind the vocabulary in Hugging Face's tensor, too.
    """

    rows: int
    padded_rows: int
    more: int = 0

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        (part,) = parts
        padding = self.padded_rows - self.rows
        part = part[: self.rows]
        return F.pad(part, (0, 0, 0, padding)) if padding else part

    def split(self, whole: Tensor) -> list[Tensor]:
        part = whole[: self.rows]
        return [F.pad(part, (0, 0, 0, self.more)) if self.more else part]


@dataclass(frozen=True)
class GroupedQKV(Layout):
    """Megatron's linear_qkv: per key/value group its query heads, then its key, then its value.

    Source: megatron/core/transformer/attention.py, SelfAttention.get_query_key_value_tensors.
    Works on weights [rows, hidden] and on biases [rows].
    """

    num_heads: int
    num_groups: int
    head_dim: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return _join_groups(parts, self.num_groups)

    def split(self, whole: Tensor) -> list[Tensor]:
        heads = self.num_heads // self.num_groups
        grouped = whole.reshape(self.num_groups, (heads + 2) * self.head_dim, *whole.shape[1:])
        sizes = [heads * self.head_dim, self.head_dim, self.head_dim]
        return [part.flatten(0, 1) for part in grouped.split(sizes, dim=1)]


@dataclass(frozen=True)
class GroupedKV(Layout):
    """The key and value projection of a cross-attention: per group its key, then its value."""

    num_groups: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return _join_groups(parts, self.num_groups)

    def split(self, whole: Tensor) -> list[Tensor]:
        grouped = whole.reshape(self.num_groups, -1, *whole.shape[1:])
        return [part.flatten(0, 1) for part in grouped.chunk(2, dim=1)]


def _join_groups(parts: Sequence[Tensor], num_groups: int) -> Tensor:
    """The first group of every part, then the second of every part, and so on."""
    grouped = [part.reshape(num_groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors it is made of, with their shapes."""

    megatron: str
    sources: Mapping[str, tuple[int, ...]]
    layout: Layout = Same()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        parts = [torch.empty(shape, device="meta") for shape in self.sources.values()]
        return tuple(self.layout.join(parts).shape)


def renamed(
    rules: Iterable[Rule],
    sources: Callable[[str], str] = str,
    *,
    megatron: Callable[[str], str] = str,
) -> list[Rule]:
    """The same rules where the Hugging Face tensors are called `sources(name)`, and our parameters
    `megatron(name)`."""
    return [
        replace(
            rule,
            megatron=megatron(rule.megatron),
            sources={sources(name): shape for name, shape in rule.sources.items()},
        )
        for rule in rules
    ]


def with_more_rows(rules: Iterable[Rule], more: int) -> list[Rule]:
    """The same rules where Hugging Face's embedding and head have so many more rows, of zeros."""
    return [_with_more(rule, more) for rule in rules]


def _with_more(rule: Rule, more: int) -> Rule:
    if not isinstance(rule.layout, PaddedVocabulary):
        return rule
    sources = {name: (rows + more, *others) for name, (rows, *others) in rule.sources.items()}
    return replace(rule, sources=sources, layout=replace(rule.layout, more=more))


def below(prefix: str) -> Callable[[str], str]:
    """Names of what is inside of something."""
    return lambda name: prefix + name


def check_tensors(
    rules: Iterable[Rule],
    found: Mapping[str, tuple[int, ...]],
    *,
    unused: Sequence[str] = (),
    origin: str,
) -> None:
    """Compare what a checkpoint holds with what the rules need.

    Args:
        found: shape of every tensor in the checkpoint.
        unused: prefixes of tensors that are known and not needed (a pooling head, say).
        origin: the checkpoint's path, for the message.

    Raises:
        CheckpointError: naming the first missing, unexpected and misshapen tensors, and how many
            there are.
    """
    needed = {name: shape for rule in rules for name, shape in rule.sources.items()}
    missing = [f"{name} {list(needed[name])}" for name in needed if name not in found]
    unexpected = [
        f"{name} {list(shape)}"
        for name, shape in found.items()
        if name not in needed and not name.startswith(tuple(unused))
    ]
    misshapen = [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in needed.items()
        if name in found and tuple(found[name]) != shape
    ]
    kinds = {"missing ": missing, "unexpected ": unexpected, "": misshapen}
    problems = [f"{kind}{some(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(
            f"{origin} does not hold the weights that its config.json describes: "
            + "; ".join(problems)
        )

"""Puts questions to a model in batches, which several ranks share, and keeps every answer.

A batch is the same whoever asks it and whenever: it depends on the questions alone, not on the
number of ranks nor on what was answered before an interruption. So all of these give the same
answers, down to the rounding.
"""

from collections.abc import Callable, Sequence

from megatron_dattn.evaluation.models import Answers
from megatron_dattn.evaluation.questions import Question
from megatron_dattn.runtime.distributed import gather_on_first_rank, rank, world_size
from megatron_dattn.runtime.rank_errors import run_on_all_ranks, run_on_first_rank

Batch = Sequence[Question]


def batches(questions: Sequence[Question], size: int) -> list[Batch]:
    """Questions about the same images beside each other, which are encoded once per batch, and
    these groups by their longest question."""
    groups: dict[tuple[str, ...], list[Question]] = {}
    for question in questions:
        groups.setdefault(question.subject, []).append(question)
    for group in groups.values():
        group.sort(key=_length)
    by_length = sorted(groups.values(), key=lambda group: _length(group[-1]))
    ordered = [question for group in by_length for question in group]
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def unanswered(parts: Sequence[Batch], answered: set[str]) -> list[Batch]:
    """The batches in which an answer is missing, whole: so they are what they were before."""
    return [batch for batch in parts if any(question.key not in answered for question in batch)]


def ask(
    parts: Sequence[Batch],
    model: Answers,
    max_new_tokens: int,
    keep: Callable[[list[tuple[Question, str]]], None],
) -> None:
    """Ask all batches, a rank one at a time; the first rank keeps the answers. Collective.

    Args:
        keep: called on the first rank with the answers of each round.

    Raises:
        UserError: on all ranks, if an image cannot be read or an answer cannot be written.
    """
    for start in range(0, len(parts), world_size()):
        mine = parts[start + rank() : start + rank() + 1]

        def answers(mine: Sequence[Batch] = mine) -> list[tuple[Question, str]]:
            return [
                pair
                for batch in mine
                for pair in zip(batch, model(batch, max_new_tokens), strict=True)
            ]

        by_rank = gather_on_first_rank(run_on_all_ranks(answers))
        together = [pair for one in by_rank for pair in one]
        run_on_first_rank(lambda together=together: keep(together))  # type: ignore[misc]


def _length(question: Question) -> int:
    return len(question.text)

"""One evaluation from the data to the table, on one rank or on several."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megatron_dattn.errors import ConfigError, DataError
from megatron_dattn.evaluation.answers import AnswerFolder, Facts, opened, read_answers
from megatron_dattn.evaluation.asking import ask, batches, unanswered
from megatron_dattn.evaluation.metrics import Metric, metric_of
from megatron_dattn.evaluation.models import Candidate, find_model
from megatron_dattn.evaluation.questions import (
    Question,
    digest,
    read_questions,
    require_answers,
)
from megatron_dattn.evaluation.report import (
    comparison_table,
    comparisons,
    estimates,
    score,
    table,
    write_scores,
)
from megatron_dattn.runtime.distributed import is_rank_0, join_world
from megatron_dattn.runtime.rank_errors import run_on_first_rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and how."""

    checkpoint: Path
    data: Path
    metric: str
    output: Path
    answers: Path | None = None
    image_root: Path | None = None
    category: str = "category"
    limit: int | None = None
    prompt_suffix: str = ""
    """Behind every question, on a line of its own."""
    template: str | None = None
    max_new_tokens: int = 64
    batch_size: int = 32
    seed: int = 0
    against: Path | None = None
    """Another run's answers to the same questions."""


@dataclass(frozen=True)
class _Prepared:
    """What every rank is told by the first."""

    questions: list[Question]
    model: Candidate
    answered: set[str]


def evaluate(wanted: Evaluation) -> str:
    """Ask what is not answered yet, and score. Collective over all ranks of the launcher.

    Returns:
        The tables, on the first rank; nothing on the others.

    Raises:
        UserError: on all ranks: the data, the checkpoint or the folder cannot be used.
    """
    metric = metric_of(wanted.metric)
    for name in ("max_new_tokens", "batch_size", "limit"):
        value = getattr(wanted, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    join_world()
    with ExitStack() as stack:
        kept: list[AnswerFolder] = []
        prepared = run_on_first_rank(partial(_prepare, wanted, metric, stack, kept))
        parts = batches(prepared.questions, wanted.batch_size)
        if missing := unanswered(parts, prepared.answered):
            _ask(missing, prepared, wanted, kept)
        return run_on_first_rank(lambda: _report(wanted, metric, prepared.questions, kept[0]))


def _prepare(
    wanted: Evaluation, metric: Metric, stack: ExitStack, kept: list[AnswerFolder]
) -> _Prepared:
    questions = read_questions(
        wanted.data,
        image_root=wanted.image_root,
        answers=wanted.answers,
        category=wanted.category,
        prompt_suffix=wanted.prompt_suffix,
        limit=wanted.limit,
    )
    require_answers(questions, metric)
    if wanted.against is not None:
        _their_answers(wanted.against, questions)
    model = find_model(wanted.checkpoint, wanted.template)
    kept.append(stack.enter_context(opened(wanted.output, _facts(wanted, model, questions))))
    return _Prepared(questions, model, set(kept[0].answers))


def _facts(wanted: Evaluation, model: Candidate, questions: Sequence[Question]) -> Facts:
    """What the answers depend on."""
    return {
        "model": model.identity,
        "questions": digest(questions),
        "template": model.template,
        "max_new_tokens": wanted.max_new_tokens,
        "batch_size": wanted.batch_size,
    }


def _ask(
    missing: Sequence[Sequence[Question]],
    prepared: _Prepared,
    wanted: Evaluation,
    kept: list[AnswerFolder],
) -> None:
    logger.info(
        "%d of %d questions are answered already", len(prepared.answered), len(prepared.questions)
    )
    model = prepared.model.load()
    total = sum(len(batch) for batch in missing)
    # disable=None: no bar where there is no terminal.
    with tqdm(total=total, unit="question", disable=None if is_rank_0() else True) as bar:

        def keep(answered: list[tuple[Question, str]]) -> None:
            kept[0].add(answered)
            bar.update(len(answered))

        ask(missing, model, wanted.max_new_tokens, keep)


def _report(
    wanted: Evaluation, metric: Metric, questions: Sequence[Question], kept: AnswerFolder
) -> str:
    ours = score(questions, kept.answers, metric)
    found = estimates(ours, seed=wanted.seed)
    text, compared = table(found, metric), None
    if wanted.against is not None:
        theirs = score(questions, _their_answers(wanted.against, questions), metric)
        compared = comparisons(ours, theirs, seed=wanted.seed)
        text += f"\n\nagainst {wanted.against}:\n\n{comparison_table(compared)}"
    write_scores(wanted.output, metric, found, compared)
    return text


def _their_answers(path: Path, questions: Sequence[Question]) -> dict[str, str]:
    answers = read_answers(path)
    absent = [question.key for question in questions if question.key not in answers]
    if absent:
        raise DataError(
            f"{path} has no answer to {len(absent)} of the {len(questions)} questions, the first "
            f"is {absent[0]}; compare runs that were asked the same"
        )
    return answers

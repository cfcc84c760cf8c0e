"""Ranks that share the questions give the answers, and the errors, of one."""

from pathlib import Path

import pytest

from megatron_dattn.errors import UserError
from megatron_dattn.evaluation.run import Evaluation, evaluate
from megatron_dattn.runtime.distributed import destroy_distributed
from tests.support.distributed import run_distributed
from tests.unit.evaluation.conftest import save_run_and_questions


def tables(wanted: Evaluation) -> str:
    """What a rank is told, or why it is not."""
    try:
        return evaluate(wanted)
    except UserError as error:
        return f"error: {error}"
    finally:
        destroy_distributed()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("evaluation")
    save_run_and_questions(base, "run")
    return base


def wanted(base: Path, output: str) -> Evaluation:
    return Evaluation(
        checkpoint=base / "run",
        data=base / "questions.jsonl",
        metric="anls",
        output=base / output,
        max_new_tokens=5,
        batch_size=2,
    )


def test_two_ranks_answer_as_one(base: Path) -> None:
    """Five batches: one rank has nothing to do in the last round."""
    alone = run_distributed(tables, 1, wanted(base, "one"))
    together = run_distributed(tables, 2, wanted(base, "two"))
    assert together == alone * 2
    assert "| all | 10 |" in alone[0]
    for name in ("answers.jsonl", "scores.json", "evaluation.json"):
        assert (base / "one" / name).read_bytes() == (base / "two" / name).read_bytes(), name


def test_a_damaged_image_ends_both(base: Path) -> None:
    """It is there, so it is met by the one rank that asks about it."""
    (base / "1.png").write_bytes(b"no picture")
    first, second = run_distributed(tables, 2, wanted(base, "damaged"))
    assert first == second
    assert first.startswith("error: rank ")
    assert "1.png" in first

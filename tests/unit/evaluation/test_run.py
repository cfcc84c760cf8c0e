"""An evaluation of a tiny run: the generator's answers, kept, scored again, compared."""

import json
from pathlib import Path

import pytest

from megatron_dattn.errors import ConfigError, DataError
from megatron_dattn.evaluation import models
from megatron_dattn.evaluation.answers import read_answers
from megatron_dattn.evaluation.questions import read_questions
from megatron_dattn.evaluation.run import Evaluation, evaluate
from megatron_dattn.inference import Prompt, generate, load_model
from megatron_dattn.runtime.distributed import destroy_distributed
from tools.evaluate import main


def wanted(base: Path, output: Path, **settings: object) -> Evaluation:
    return Evaluation(
        checkpoint=base / "dattn",
        data=base / "questions.jsonl",
        output=output,
        **{"metric": "exact", "max_new_tokens": 6, "batch_size": 4, **settings},  # type: ignore[arg-type]
    )


def run(base: Path, output: Path, **settings: object) -> str:
    try:
        return evaluate(wanted(base, output, **settings))
    finally:
        destroy_distributed()


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("done") / "out"
    return output, run(base, output)


def test_answers_are_the_generators(base: Path, done: tuple[Path, str]) -> None:
    answers = read_answers(done[0] / "answers.jsonl")
    loaded = load_model(base / "dattn")
    for question in read_questions(base / "questions.jsonl"):
        prompt = Prompt.from_question(loaded, question.text, question.paths)
        assert generate(loaded, [prompt], max_new_tokens=6) == [answers[question.key]]
    destroy_distributed()
    assert len(set(answers.values())) > 1
    assert [line.split("|")[1].strip() for line in done[1].splitlines()[2:]] == [
        "even",
        "odd",
        "all",
    ]


def test_another_metric_asks_nothing(
    base: Path, done: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_found", None)
    assert run(base, done[0]) == done[1]
    table = run(base, done[0], metric="anls")
    assert "ANLS" in table
    assert json.loads((done[0] / "scores.json").read_text())["all"]["metric"] == "anls"


def test_an_interrupted_evaluation_gives_the_same_answers(
    base: Path, done: tuple[Path, str], tmp_path: Path
) -> None:
    file = done[0] / "answers.jsonl"
    (tmp_path / "evaluation.json").write_bytes((done[0] / "evaluation.json").read_bytes())
    (tmp_path / "answers.jsonl").write_bytes(file.read_bytes()[: 2 * file.stat().st_size // 3])
    assert run(base, tmp_path) == done[1]
    assert (tmp_path / "answers.jsonl").read_bytes() == file.read_bytes()


def test_a_run_is_compared_with_another(base: Path, done: tuple[Path, str], tmp_path: Path) -> None:
    """The other answers everything right."""
    other = tmp_path / "answers.jsonl"
    lines = [json.dumps({"question_id": str(n), "text": "a"}) for n in range(10)]
    other.write_text("\n".join(lines))
    text = run(base, done[0], against=other)
    assert text.startswith(done[1])
    assert "| all | -" in text.partition(f"against {other}")[2]
    other.write_text("\n".join(lines[:8]))
    with pytest.raises(DataError, match="no answer to 2 of the 10 questions, the first is 8"):
        run(base, done[0], against=other)


def test_wrong_settings_are_refused(base: Path, done: tuple[Path, str]) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens is 7 now, and was 6"):
        run(base, done[0], max_new_tokens=7)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        run(base, done[0], batch_size=0)
    with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
        run(base, done[0], limit=0)
    with pytest.raises(ConfigError, match="no metric 'vqa2'"):
        run(base, done[0], metric="vqa2")


def test_the_command_line(
    base: Path, done: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", str(base / "dattn"), "--data", str(base / "questions.jsonl")]
    flags += ["--output", str(done[0]), "--max-new-tokens", "6", "--batch-size", "4"]
    assert main([*flags, "--metric", "exact"]) == 0
    assert capsys.readouterr().out == f"{done[1]}\n"
    assert main([*flags, "--metric", "nothing"]) == 2
    assert "error: there is no metric 'nothing'" in capsys.readouterr().err

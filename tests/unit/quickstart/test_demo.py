"""The demo's plan: training commands parse, and a stopped step is not taken for a done one."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart.demo import (
    STAGES,
    Demo,
    Step,
    export_and_ask,
    is_done,
    plan,
    prepare,
    run,
)
from megatron_dattn.config.cli import parse_command_line


def _demo(output: Path, **changed: Any) -> Demo:
    settings = {"shared": output, "attention": "s_attn", "processes": 2, **changed}
    return Demo(output, **settings)


def _training_steps(demo: Demo) -> list[Step]:
    steps = plan(demo)
    return [step for step in steps if "pretrain_vlm.py" in step.command]


def _written_configs(output: Path) -> None:
    """What the steps before training write, as far as the command line reads it."""
    (output / "base").mkdir(parents=True)
    (output / "base" / "config.yaml").write_text("model: {attention: s_attn}\n")
    for stage in STAGES:
        for section in ("train", "validation"):
            folder = output / "data" / "prepared" / stage / section
            folder.mkdir(parents=True)
            text = f"data: {{{section}: [{{path: {stage}.jsonl}}]}}\n"
            (folder / f"{section}.yaml").write_text(text)


@pytest.mark.parametrize("processes", [1, 2])
def test_training_commands_parse_and_chain(tmp_path: Path, processes: int) -> None:
    _written_configs(tmp_path)
    previous = tmp_path / "base"
    steps = _training_steps(_demo(tmp_path, processes=processes))
    for stage, step in zip(STAGES, steps, strict=True):
        flags = step.command[step.command.index("pretrain_vlm.py") + 1 :]
        config = parse_command_line(flags).config
        assert config.training.stage == stage
        assert config.model.attention == "s_attn"
        assert config.parallel.tensor_model_parallel_size == processes
        assert config.parallel.sequence_parallel == (processes > 1)
        assert config.checkpoint.load == str(previous)
        assert config.data.train[0].path == config.data.validation[0].path == f"{stage}.jsonl"
        previous = tmp_path / stage
        assert config.checkpoint.save == str(previous)


def test_the_preset_reaches_the_conversion(tmp_path: Path) -> None:
    (convert,) = [step for step in plan(_demo(tmp_path)) if "import" in step.command]
    assert convert.command[convert.command.index("--attention") + 1] == "s_attn"


def test_the_card_of_the_export_gets_what_the_evaluation_wrote(tmp_path: Path) -> None:
    demo = _demo(tmp_path)
    (evaluate,) = [step for step in plan(demo) if "examples.quickstart.evaluate" in step.command]
    written = Path(evaluate.command[evaluate.command.index("--output") + 1]) / "accuracy.json"
    export = export_and_ask(demo)[0].command
    assert export[export.index("--metrics") + 1] == str(written)


def test_a_shorter_run_with_another_seed_shares_what_does_not_depend_on_it(tmp_path: Path) -> None:
    _written_configs(tmp_path)
    demo = _demo(tmp_path, steps={"stage2": 200, "stage3": 400}, training=("--training.seed", "7"))
    steps = _training_steps(demo)
    iterations = []
    for step in steps:
        flags = step.command[step.command.index("pretrain_vlm.py") + 1 :]
        config = parse_command_line(flags).config
        assert config.training.seed == 7
        iterations.append(config.training.train_iters)
    assert iterations == [60, 200, 400]
    elsewhere = _demo(tmp_path / "other", shared=tmp_path)
    assert prepare(elsewhere) == prepare(demo)


def test_only_a_finished_run_is_done(tmp_path: Path) -> None:
    step = Step("train", [], tmp_path / "exit_reason.json")
    assert not is_done(step)
    for reason, done in (("signal", False), ("user_error", False), ("finished", True)):
        (tmp_path / "exit_reason.json").write_text(json.dumps({"reason": reason}))
        assert is_done(step) == done


def test_a_failed_or_stopped_step_ends_the_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = Step("later", [sys.executable, "-c", "print('ran')"])
    fails = Step("fails", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit) as ending:
        run([fails, later])
    assert ending.value.code == 3
    stopped = Step("stopped", [sys.executable, "-c", ""], tmp_path / "none")
    with pytest.raises(SystemExit) as ending:
        run([stopped, later])
    assert ending.value.code == 2
    captured = capsys.readouterr()
    assert "later" not in captured.out
    assert "stopped before its end" in captured.err


def test_what_is_done_is_not_repeated(tmp_path: Path) -> None:
    result = tmp_path / "result"
    code = f"open({str(result)!r}, 'a').write('x')"
    step = Step("once", [sys.executable, "-c", code], result)
    run([step, step])
    assert result.read_text() == "x"


def test_what_is_half_made_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "half").touch()
    code = f"import os; os.mkdir({str(folder)!r}); open({str(folder / 'result')!r}, 'w')"
    run([Step("make", [sys.executable, "-c", code], folder / "result", folder)])
    assert [path.name for path in folder.iterdir()] == ["result"]

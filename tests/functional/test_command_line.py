"""Mistakes of users: one clear line on rank 0, exit code 2 everywhere, no checkpoint harmed."""

import contextlib
import dataclasses
import io
import json
import os
import re
from pathlib import Path

import pytest

from megatron_dattn.checkpoint import find_checkpoint
from megatron_dattn.training.run_lock import LOCK_FILE, Owner, RunLock
from megatron_dattn.training.sample_ledger import read_ledger
from tests.functional.workspace import Workspace, make_workspace, pretrain, run_mains
from tests.functional.workspace import run_main as _main
from tests.support.distributed import run_distributed
from tests.unit.data.builders import make_dataset, make_records


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def _assert_one_line(answers: list[tuple[int, str]], words: list[str]) -> None:
    (code, message), *others = answers
    assert code == 2
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    for word in words:
        assert word in message
    assert others == [(2, "")] * len(others)


@pytest.mark.parametrize(
    ("ranks", "flags", "words"),
    [
        (1, ["--nope", "1"], ["--nope"]),
        (1, ["--train-iters", "many"], ["train_iters", "int", "many"]),
        (1, ["--config", "missing.yaml"], ["missing.yaml"]),
        (2, ["--tensor-model-parallel-size", "3"], ["tensor_model_parallel_size 3", "size 2"]),
        (2, ["--global-batch-size", "10"], ["global_batch_size 10", "4"]),
        (
            2,
            [*"--tensor-model-parallel-size 2 --sequence-parallel --text-budget 161".split()],  # noqa: SIM905
            ["161", "tensor_model_parallel_size 2"],
        ),
        (2, ["--data.tokenizer", "nowhere"], ["nowhere"]),
        (2, ["--data.train", "[{path: nowhere.jsonl}]"], ["nowhere.jsonl"]),
        (1, ["--visual-budget", "3"], ["visual_budget 3", "4"]),
        (1, ["--eval-interval", "2", "--data.validation", "[]"], ["data.validation"]),
        (2, ["--load", "nowhere"], ["nowhere", "checkpoint"]),
        (1, ["--attention-backend", "cuda_flash"], ["cuda_flash", "cpu"]),
        (2, ["--tensorboard-dir", f"{__file__}/inside"], ["test_command_line.py/inside"]),
        (2, ["--logging.sample_ledger", f"{__file__}/inside"], ["test_command_line.py/inside"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else str(value),
)
def test_mistakes(workspace: Workspace, ranks: int, flags: list[str], words: list[str]) -> None:
    argv = [*workspace.flags("mistakes"), *flags]
    _assert_one_line(run_distributed(_main, ranks, argv), words)


def _main_of_its_own(argvs: list[list[str]]) -> tuple[int, str]:
    """As `_main`, with a command line for each rank."""
    return _main(argvs[int(os.environ["RANK"])])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--optimizer.learning_rates.adapter", "0.5"], ["rates.adapter is 0.5 on rank 1 (host"]),
        (["--tensor-model-parallel-size", "2"], ["tensor_model_parallel_size is 2 on rank 1"]),
        (["--checkpoint.save", "elsewhere"], ['checkpoint.save is "elsewhere" on rank 1']),
        (["--train-iters", "many"], ["rank 1 (host ", "train_iters", "many"]),
        (["--config", "missing.yaml"], ["rank 1 (host ", "missing.yaml"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_ranks_that_were_started_differently(
    workspace: Workspace, flags: list[str], words: list[str]
) -> None:
    argv = workspace.flags("differently")
    answers = run_distributed(_main_of_its_own, 2, [argv, [*argv, *flags]], timeout=60)
    _assert_one_line(answers, words)
    assert not list((workspace.folder / "differently").glob("step-*"))


def test_a_folder_in_which_another_run_works_is_left_alone(workspace: Workspace) -> None:
    flags = workspace.flags("taken", train_iters=2)
    folder = workspace.folder / "taken"
    lock = RunLock.acquire(folder)
    try:
        (code, said), *_ = run_distributed(_main, 1, flags)
        assert code == 2
        assert "is in use by run" in said
        assert [path.name for path in folder.iterdir()] == ["run.lock"]
    finally:
        lock.release()
    assert run_distributed(_main, 1, flags) == [(0, "")]
    assert not (folder / "run.lock").exists()


def test_a_user_error_is_written_down(workspace: Workspace) -> None:
    run_distributed(_main, 1, [*workspace.flags("noted"), "--load", "nowhere"])
    note = json.loads((workspace.folder / "noted" / "exit_reason.json").read_text())
    assert note["reason"] == "user_error"
    assert note["exit_code"] == 2
    assert "nowhere" in note["detail"]


def test_a_mistake_after_a_kill_is_told_as_one(workspace: Workspace) -> None:
    """A killed run leaves its lock: the next start's mistake must not look like another crash."""
    folder = workspace.folder / "killed"
    folder.mkdir()
    owner = Owner.of_this_process()
    dead = dataclasses.replace(owner, started=owner.started - 3600)
    (folder / LOCK_FILE).write_text(json.dumps(dataclasses.asdict(dead)))
    flags = [*workspace.flags("killed"), "--load", "nowhere"]
    _assert_one_line(run_distributed(_main, 1, flags), ["nowhere"])
    assert json.loads((folder / "exit_reason.json").read_text())["reason"] == "user_error"


def test_checkpoints_of_another_run_are_refused_and_stay(workspace: Workspace) -> None:
    flags = workspace.flags("first", train_iters=2)
    assert run_distributed(_main, 1, flags) == [(0, "")]
    folder = workspace.folder / "first"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refusals = (
        (["--model.language.intermediate_size", "48"], ["intermediate_size", "64", "48"]),
        (["--attention", "s_attn"], ["attention", "dattn", "s_attn"]),
        (["--stage", "stage9"], ["stage", "stage1", "stage9"]),
        (["--train-iters", "5"], ["schedule", "train_iters"]),
        (
            ["--optimizer.learning_rates.adapter", "1e-3"],
            ["learning_rates.adapter", "0.001", "0.002"],
        ),
        (["--global-batch-size", "4"], ["global_batch_size", "8", "4"]),
        (["--adam-beta2", "0.95"], ["adam_beta2", "0.999", "0.95"]),
        (["--optimizer.learning_rates.language_model", "5e-4"], ["language_model", "0.0005"]),
    )
    lines = [[*flags, *changes] for changes, _ in refusals]
    (answers,) = run_distributed(run_mains, 1, lines)
    for answer, (_, words) in zip(answers, refusals, strict=True):
        _assert_one_line([answer], words)
    note = folder / "exit_reason.json"
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del before[note], after[note]
    report = folder / "resume_report.json"  # a resume that went far enough to be reported
    after.pop(report, None)
    assert after == before


def _losses(log: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"lm loss: (\S+)", log)]


def _main_with_log(argv: list[str]) -> tuple[int, str]:
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        code, _ = _main(argv)
    return code, stdout.getvalue()


def test_a_stage_starts_from_another_ones_weights_under_any_layout(workspace: Workspace) -> None:
    """The whole way (one loader, broadcast, resharded weights) gives the same losses.

    fp32 sums in another order differ by about 1e-7 relative, which three AdamW steps amplify.
    """
    first = workspace.flags("stage1", train_iters=2)
    ((code, _),) = run_distributed(_main_with_log, 1, first)
    assert code == 0
    load = {"stage": "stage2", "load": workspace.folder / "stage1", "train_iters": 3}
    curves = []
    for name, ranks, layout in (
        ("one", 1, {}),
        ("tp2", 2, {"tensor_model_parallel_size": 2, "sequence_parallel": "true"}),
        ("pp2", 2, {"pipeline_model_parallel_size": 2}),
    ):
        flags = workspace.flags(f"stage2-{name}", **load, **layout)
        answers = run_distributed(_main_with_log, ranks, flags)
        assert [code for code, _ in answers] == [0] * ranks
        curves.append(_losses(answers[0][1]))
        ledger = workspace.folder / f"stage2-{name}" / "ledger" / "samples-dp00000.jsonl"
        assert read_ledger(ledger) == read_ledger(
            workspace.folder / "stage2-one" / "ledger" / "samples-dp00000.jsonl"
        )
    assert len(curves[0]) == 3
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_validation_data_of_one_record_is_evaluated_by_the_rank_that_has_it(
    workspace: Workspace,
) -> None:
    """With two data-parallel ranks one has no pack; the loss is that of one process.

    Both evaluate the same pack by the same weights, as rates of 1e-12 leave them where they were.
    """
    few = make_dataset(
        workspace.folder / "data", make_records(workspace.folder / "data", 1), "single"
    )
    flags = ["--data.validation", f"[{{path: {few.path}}}]", "--eval-interval", "1"]
    for module in ("vision_model", "adapter", "language_model"):
        flags += [f"--optimizer.learning_rates.{module}", "1e-12"]
    losses = []
    for ranks in (1, 2):
        argv = [*workspace.flags(f"validation-{ranks}", train_iters=1), *flags]
        (code, log), *_ = run_distributed(_main_with_log, ranks, argv)
        assert code == 0, log
        losses += re.findall(r"validation at iteration 1 \| lm loss value: (\S+)", log)
    first, second = map(float, losses)
    assert second == pytest.approx(first, rel=1e-5)


def _keys(ledger: Path) -> dict[int, set[str]]:
    """Sample keys that each step consumed."""
    return {
        step: {key for pack in packs for key in pack} for step, packs in read_ledger(ledger).items()
    }


def test_a_missing_image_that_must_stop_the_run_costs_no_checkpoint(tmp_path: Path) -> None:
    """A sample of the fifth step names an image that is not there: the run ends and can go on."""
    workspace = make_workspace(tmp_path)
    settings = {"bad_samples": "fail", "save_interval": 1}
    assert run_distributed(_main, 1, workspace.flags("whole", **settings)) == [(0, "")]
    consumed = _keys(tmp_path / "whole" / "ledger" / "samples-dp00000.jsonl")
    early = set.union(*(consumed[step] for step in range(1, 5)))
    data = tmp_path / "data" / "train.jsonl"
    good = data.read_bytes()
    lines = good.splitlines(keepends=True)
    number = next(
        number
        for key in sorted(consumed[5] - early)
        if b"images/" in lines[number := int(key.rpartition("-")[2])]
    )
    # Of the same length: the index of the lines stays true.
    lines[number] = lines[number].replace(b"images/", b"images?")
    data.write_bytes(b"".join(lines))
    flags = workspace.flags("stopped", **settings)
    words = [f"train-{number:09d}", "missing_image", "images?", "data.bad_samples"]
    _assert_one_line(run_distributed(_main, 1, flags), words)
    found = find_checkpoint(tmp_path / "stopped")
    assert found is not None
    assert 1 <= found.step < 5
    data.write_bytes(good)
    assert run_distributed(_main, 1, flags) == [(0, "")]
    packs = read_ledger(tmp_path / "stopped" / "ledger" / "samples-dp00000.jsonl")
    assert list(packs) == list(range(1, 9))
    assert max(len(pack) for step in packs.values() for pack in step) == 2
    first_epoch = [key for step in range(1, 6) for pack in packs[step] for key in pack]
    assert f"train-{number:09d}" in first_epoch


def test_numbers_that_stay_bad_end_the_run_with_their_own_code(workspace: Workspace) -> None:
    """A learning rate of 1e30 ruins the weights in the second step; none of it is saved."""
    flags = workspace.flags("ruined", save_interval=100)
    flags += ["--optimizer.learning_rates.language_model", "1e30", "--max-skipped-steps", "2"]
    ((code, message),) = run_distributed(_main, 1, flags)
    assert code == 17
    assert message.startswith("error: loss or gradients were not finite in 2 steps in a row")
    note = json.loads((workspace.folder / "ruined" / "exit_reason.json").read_text())
    assert (note["reason"], note["exit_code"], note["step"]) == ("numerics", 17, 4)
    assert find_checkpoint(workspace.folder / "ruined") is None


def test_dry_run_touches_nothing(workspace: Workspace) -> None:
    ((code, plan),) = run_distributed(_main_with_log, 1, [*workspace.flags("planned"), "--dry-run"])
    assert code == 0
    assert "Parameters" in plan
    assert not (workspace.folder / "planned").exists()


def test_the_script_itself_without_torchrun(workspace: Workspace) -> None:
    done = pretrain([*workspace.flags("mistakes"), "--nope"])
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: unrecognized arguments: --nope; --help has all settings\n"

"""How runs end before they trained, or when they are started again, and what they leave behind."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.functional.workspace import (
    ROOT,
    Workspace,
    environment,
    make_workspace,
    pretrain,
    run_main,
)
from tests.support.distributed import run_distributed


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def finished(workspace: Workspace) -> Path:
    """The folder of a stage of two steps that is done."""
    assert run_distributed(run_main, 1, workspace.flags("done", train_iters=2)) == [(0, "")]
    return workspace.folder / "done"


def _main_with_log(argv: list[str]) -> tuple[int, str, str]:
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        code, stderr = run_main(argv)
    return code, stderr, stdout.getvalue()


def _mains_with_log(argvs: list[list[str]]) -> list[tuple[int, str, str]]:
    return [_main_with_log(argv) for argv in argvs]


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_stage_says_so_before_it_builds_anything(
    workspace: Workspace, finished: Path
) -> None:
    """Nor does it need its data any more."""
    before = _contents(finished)
    flags = [*workspace.flags("done", train_iters=2), "--data.train", "[{path: gone.jsonl}]"]
    answers = run_distributed(_main_with_log, 2, flags)
    assert [(code, error) for code, error, _ in answers] == [(0, "")] * 2
    log = answers[0][2]
    assert f"stage stage1 is finished: {finished} holds all of its 2 iterations" in log
    assert "optimizer group" not in log
    assert _contents(finished) == before
    note = json.loads((finished / "exit_reason.json").read_text())
    assert (note["reason"], note["step"]) == ("finished", 2)


def test_a_refused_folder_is_not_written_into(workspace: Workspace, finished: Path) -> None:
    """Neither another run's, whatever the error is, nor another program's."""
    before = _contents(finished)
    for change in (
        ["--stage", "stage9"],
        ["--train-iters", "5"],
        ["--stage", "stage9", "--global-batch-size", "7"],
    ):
        flags = [*workspace.flags("done", train_iters=2), *change]
        ((code, _),) = run_distributed(run_main, 1, flags)
        assert code == 2
        assert _contents(finished) == before
    foreign = workspace.folder / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"weights")
    for change in ([], ["--global-batch-size", "7"]):
        ((code, _),) = run_distributed(run_main, 1, [*workspace.flags("foreign"), *change])
        assert code == 2
        assert [path.name for path in foreign.iterdir()] == ["model.safetensors"]


def test_an_own_folder_is_told_of_a_mistake(workspace: Workspace, finished: Path) -> None:
    """Also if the tokenizer, which is part of a run's identity, is what is missing."""
    flags = [*workspace.flags("done", train_iters=2), "--data.tokenizer", "nowhere"]
    before = (finished / "exit_reason.json").read_text()
    ((code, message),) = run_distributed(run_main, 1, flags)
    assert code == 2
    assert "nowhere" in message
    note = json.loads((finished / "exit_reason.json").read_text())
    assert note["reason"] == "user_error"
    assert note["detail"] in message
    (finished / "exit_reason.json").write_text(before)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.tokenizer", "nowhere"], "nowhere"),
        (["--data.train", "[{path: nowhere.jsonl}]"], "nowhere.jsonl"),
        (["--eval-interval", "2", "--data.validation", "[]"], "data.validation"),
        (["--eval-interval", "2", "--data.validation", "[{path: no.jsonl}]"], "no.jsonl"),
        (["--load", "nowhere"], "no checkpoint in nowhere"),
        (["--fp8", "hybrid"], "Transformer Engine"),
        (["--transformer-impl", "transformer_engine"], "transformer_engine"),
        (["--attention-backend", "cuda_flash"], "cuda_flash"),
        (["--data.template", "llama3"], "llama3"),
        (["--data.image_processor", "nowhere"], "nowhere"),
        (["--model.language.vocab_size", "64"], "vocab_size"),
        (["--tensorboard-dir", f"{__file__}/inside"], "test_endings.py"),
        (["--logging.sample_ledger", f"{__file__}/inside"], "test_endings.py"),
        (["--checkpoint.save", f"{__file__}/inside"], "test_endings.py"),
        (["--visual-budget", "3"], "visual_budget 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_the_dry_run_finds_what_ends_a_start(
    workspace: Workspace, flags: list[str], words: str
) -> None:
    """Both refuse it, with the same words and before a model is built."""
    argv = [*workspace.flags("mistake"), *flags]
    ((start, plan),) = run_distributed(_mains_with_log, 1, [argv, [*argv, "--dry-run"]])
    code, started, log = start
    assert code == 2
    assert words in started
    assert "optimizer group" not in log
    code, planned, _ = plan
    assert code == 2
    assert planned.count("\n") == 1
    assert started.removeprefix("error: ").strip() in planned


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--train-iters", "5"], "schedule.train_iters"),
        (["--attention", "s_attn"], "model.attention"),
        (["--data.text_budget", "176"], "data.text_budget"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_the_dry_run_compares_with_the_checkpoint(
    workspace: Workspace, finished: Path, change: list[str], words: str
) -> None:
    argv = [*workspace.flags("done", train_iters=2), *change, "--dry-run"]
    answers = run_distributed(_planned_on_one_rank, 1, argv)
    ((code, message),) = answers
    assert code == 2
    assert words in message


def _planned_on_one_rank(argv: list[str]) -> tuple[int, str]:
    os.environ["WORLD_SIZE"] = "1"  # how many ranks there would be: the split depends on it
    return run_main(argv)


def _start(flags: list[str], **variables: str) -> tuple[subprocess.CompletedProcess[str], float]:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "pretrain_vlm.py"), *flags],
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done, time.monotonic() - started


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_nobody_meets_ends_in_one_line(workspace: Workspace, rank: str) -> None:
    port = _free_port()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run = f"lonely-{rank}"
    flags = workspace.flags(run, rendezvous_timeout_minutes=0.02)
    done, _ = _start(flags, **place)
    assert done.returncode == 18, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    said = done.stderr if rank == "0" else done.stdout  # rank 0 speaks for all, the others log
    (line,) = [line for line in said.splitlines() if "rendezvous_timeout_minutes" in line]
    assert f"127.0.0.1:{port}" in line
    assert f"rank {rank} on " in line
    note = json.loads((workspace.folder / run / "exit_reason.json").read_text())
    assert (note["reason"], note["exit_code"]) == ("rendezvous", 18)
    if rank == "0":
        assert f"meeting the others at 127.0.0.1:{port}" in done.stdout


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK is 1, but the world has 1 ranks"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "Slurm has reserved 2 tasks"),
    ],
)
def test_a_launcher_that_makes_no_sense_is_refused(
    workspace: Workspace, variables: dict[str, str], words: str
) -> None:
    done, _ = _start(workspace.flags("senseless"), **variables)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_torchrun_is_told_the_reason_once(workspace: Workspace) -> None:
    """Its own traceback comes in any case; the last that it shows is our line."""
    done = pretrain([*workspace.flags("told"), "--load", "nowhere"], ranks=2)
    assert done.returncode == 1
    root_cause = done.stderr.split("Root Cause")[1]
    assert "rank      : 0" in root_cause
    assert "traceback : error: there is no checkpoint in nowhere" in root_cause
    assert "<N/A>" not in done.stderr
    assert done.stderr.count("there is no checkpoint in nowhere") == 2, "ours and torchrun's"

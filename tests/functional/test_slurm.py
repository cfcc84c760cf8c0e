"""The Slurm scripts under stand-ins for Slurm's commands (tests/support/slurm.py)."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.slurm import (
    ROOT,
    SLURM,
    TRAIN_ITERS,
    Cluster,
    free_port,
    newest_step,
    start_attempt,
    wait_for,
    write_recipe,
)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """The scripts alone: torchrun is a stand-in too."""
    cluster = Cluster(tmp_path, real_torchrun=False)
    yield cluster
    cluster.close()


@pytest.fixture
def training_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """The real torchrun and pretrain_vlm.py on a tiny recipe in `recipe/`."""
    cluster = Cluster(tmp_path, real_torchrun=True)
    write_recipe(tmp_path)
    yield cluster
    cluster.close()


def test_job_outlives_a_preemption_and_a_killed_rank(training_cluster: Cluster) -> None:
    """Two nodes of one rank each, tensor parallel across them, in three attempts: SIGTERM to the
    batch script, SIGKILL to one rank of the next, and one that is left alone."""
    cluster = training_cluster
    stage = cluster.folder / "checkpoints" / "recipe" / "stage1"

    job = start_attempt(cluster, 0)
    assert wait_for(lambda: "| lm loss:" in cluster.log(), job), cluster.log()
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=120) == 75, cluster.log()
    ending = cluster.exit_reason(stage)
    assert ending["reason"] == "signal"
    step = ending["step"]
    assert 0 < step < TRAIN_ITERS
    assert "Traceback" not in cluster.log(), "an orderly stop is no error, torchrun's neither"
    assert "step ended with status 0, exit reason: signal" in cluster.log()
    assert json.loads((stage / "latest.json").read_text())["step"] == step
    assert cluster.noted("scontrol") == ["requeue 12345"]
    logs = cluster.folder / "logs" / "recipe" / "stage1" / "job-12345-0"
    assert len(list(logs.glob("node-0/*/attempt_0/0/stdout.log"))) == 1
    assert len(list(logs.glob("node-1/*/attempt_0/0/stdout.log"))) == 1

    before = len(cluster.log())
    job = start_attempt(cluster, 1, GRACE_SECONDS="5")
    assert wait_for(lambda: newest_step(stage) > step, job), cluster.log()
    ranks_of(job)[-1].kill()
    assert job.wait(timeout=120) == 75, cluster.log()
    assert cluster.noted("scontrol") == ["requeue 12345"] * 2
    assert_goes_on_from(step, cluster.log()[before:])

    before, step = len(cluster.log()), newest_step(stage)
    assert step < TRAIN_ITERS
    assert start_attempt(cluster, 2).wait(timeout=240) == 0, cluster.log()
    assert cluster.exit_reason(stage)["reason"] == "finished"
    assert_goes_on_from(step, cluster.log()[before:])
    assert cluster.noted("scontrol") == ["requeue 12345"] * 2


def assert_goes_on_from(step: int, log: str) -> None:
    assert f"iteration {step + 1:3d}/{TRAIN_ITERS} |" in log
    assert f"iteration {step:3d}/{TRAIN_ITERS} |" not in log


def test_all_nodes_meet_at_the_first_host(cluster: Cluster) -> None:
    assert cluster.run("--training.seed", "7", ENDING="finished") == 0
    calls = [json.loads(cluster.noted(f"torchrun-{node}")[0]) for node in (0, 1)]
    for node, call in enumerate(calls):
        words = " ".join(call["arguments"])
        assert f"--nnodes 2 --node-rank {node} --master-addr 127.0.0.1" in words
        assert call["port"] == str(20000 + 12345 % 12000)
        assert "--nproc-per-node 1" in words
        assert "--shutdown-timeout 270" in words
        assert "--rdzv-conf timeout=600" in words
        assert "--max-restarts 0" in words
        assert f"{ROOT}/examples/mistral_7b/stage1.yaml" in words
        assert f"--checkpoint.save {cluster.folder}/checkpoints/mistral_7b/stage1" in words
        assert words.endswith("--training.seed 7")


@pytest.mark.parametrize(
    ("ending", "status", "restarts", "code", "requeued"),
    [
        ("finished", "0", "0", 0, False),
        ("signal", "1", "0", 75, True),  # torchrun ends with 1 after an orderly stop
        ("signal", "1", "50", 1, False),  # too often
        ("user_error", "2", "0", 2, False),
        ("numerics", "1", "0", 1, False),
        ("", "137", "0", 75, True),  # died without a word
        ("crash", "1", "0", 75, True),
        ("rendezvous", "1", "0", 75, True),
        ("crash", "1", "50", 1, False),
    ],
)
def test_a_stage_that_can_go_on_returns_to_the_queue(
    cluster: Cluster, ending: str, status: str, restarts: str, code: int, requeued: bool
) -> None:
    environment = {"ENDING": ending, "STATUS": status, "SLURM_RESTART_COUNT": restarts}
    assert cluster.run(**environment) == code, cluster.log()
    assert cluster.noted("scontrol") == (["requeue 12345"] if requeued else [])


def stage_folder(cluster: Cluster) -> Path:
    return cluster.folder / "checkpoints" / "mistral_7b" / "stage1"


def make_checkpoint(cluster: Cluster, step: int) -> None:
    """A folder of that name: the scripts look no further."""
    (stage_folder(cluster) / f"step-{step:07d}").mkdir(parents=True)


def crash(cluster: Cluster, attempt: int, **environment: str) -> int:
    return cluster.run(STATUS="137", SLURM_RESTART_COUNT=str(attempt), **environment)


def test_no_attempt_is_made_twice_from_the_same_checkpoint(cluster: Cluster) -> None:
    assert crash(cluster, 0) == 75
    assert "the next attempt starts from step none" in cluster.log()
    make_checkpoint(cluster, 8)
    assert crash(cluster, 1) == 75
    make_checkpoint(cluster, 100)
    (stage_folder(cluster) / "step-0000200.tmp-1-0123456789ab-node").mkdir()
    assert crash(cluster, 2) == 75
    assert "the next attempt starts from step 100" in cluster.log()
    assert crash(cluster, 3) == 137, cluster.log()
    assert "crashed again before a checkpoint after step 100: giving up" in cluster.log()
    assert cluster.noted("scontrol") == ["requeue 12345"] * 3


def test_crashes_are_counted(cluster: Cluster) -> None:
    for attempt in range(2):
        make_checkpoint(cluster, attempt)
        assert crash(cluster, attempt, MAX_CRASHES="2") == 75
    make_checkpoint(cluster, 2)
    assert crash(cluster, 2, MAX_CRASHES="2") == 137
    assert "crashed 2 times before: giving up" in cluster.log()


def test_a_crash_may_be_final(cluster: Cluster) -> None:
    assert crash(cluster, 0, MAX_CRASHES="0") == 137
    assert cluster.noted("scontrol") == []


def test_a_lost_host_counts_as_a_crash(cluster: Cluster) -> None:
    """Slurm requeues such a job itself: the former attempt's script has not come to its end."""
    logs = cluster.folder / "logs" / "mistral_7b" / "stage1"
    logs.mkdir(parents=True)
    running = logs / "job-12345-running"
    running.touch()
    assert cluster.run(ENDING="finished", SLURM_RESTART_COUNT="1") == 0
    assert not running.exists()
    running.touch()
    assert cluster.run(ENDING="finished", SLURM_RESTART_COUNT="2") == 1
    assert "lost with its host" in cluster.log()


def test_a_job_that_slurm_requeues_for_ever_ends(cluster: Cluster) -> None:
    assert cluster.run(ENDING="finished", SLURM_RESTART_COUNT="51") == 1
    assert "restarted 50 times already" in cluster.log()
    assert cluster.noted("torchrun-0") == []


def test_a_former_ending_is_not_believed(cluster: Cluster) -> None:
    """A mistake in the configuration of an earlier job says nothing of this one's crash."""
    stage_folder(cluster).mkdir(parents=True)
    reason = {"reason": "user_error", "step": 1}
    (stage_folder(cluster) / "exit_reason.json").write_text(json.dumps(reason))
    assert crash(cluster, 0) == 75


def ranks_of(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of pretrain_vlm.py that torchrun has started."""
    return [
        process
        for process in psutil.Process(job.pid).children(recursive=True)
        if "pretrain_vlm.py" in " ".join(process.cmdline()[:4])
        and "torchrun" not in " ".join(process.cmdline())
        and "pretrain_vlm.py" not in " ".join(process.parent().cmdline()[:4])
    ]


def test_a_mistake_that_no_folder_tells_of_is_final(cluster: Cluster) -> None:
    """A run that was refused the save folder writes nothing there; srun's or torchrun's word is."""
    assert cluster.run(ERROR_CODE="2", STATUS="1") == 1
    assert cluster.run(STATUS="2") == 1
    assert cluster.log().count("a mistake that has to be mended") == 2
    assert cluster.run(ERROR_CODE="1", STATUS="1", SLURM_JOB_ID="777") == 75, "a crash"
    assert cluster.noted("scontrol") == ["requeue 777"]


def test_a_wrong_option_is_not_tried_again(training_cluster: Cluster) -> None:
    """Of the real script under the real torchrun, which ends with 1."""
    cluster = training_cluster
    recipe = {"RECIPE": str(cluster.folder / "recipe"), "MASTER_PORT": str(free_port())}
    assert cluster.run("--training.stepz", "7", **recipe) == 1, cluster.log()
    assert "a mistake that has to be mended" in cluster.log()
    assert cluster.noted("scontrol") == []
    assert "error_file: <N/A>" not in cluster.log()
    assert "traceback : error: " in cluster.log()


def test_a_step_that_does_not_stop_in_time_is_killed_and_returns(cluster: Cluster) -> None:
    """Otherwise Slurm would end the job, and with it the chance to requeue it."""
    job = cluster.start(DEAF="1", GRACE_SECONDS="2")
    assert wait_for(lambda: (cluster.notes / "deaf-1").exists(), job), cluster.log()
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 75, cluster.log()
    calls = cluster.noted("scancel")
    assert calls[0] == "--signal=TERM"
    assert calls[-1] == "--signal=KILL"
    logs = cluster.folder / "logs" / "mistral_7b" / "stage1"
    assert not (logs / "job-12345-crashes").exists()


def test_srun_starts_the_ranks_without_torchrun(training_cluster: Cluster) -> None:
    """The other documented way: one task per rank, which meet by Slurm's variables."""
    cluster = training_cluster
    recipe, run = cluster.folder / "recipe", cluster.folder / "run"
    command = ["srun", "--ntasks-per-node=2", sys.executable, str(ROOT / "pretrain_vlm.py")]
    command += ["--config", f"{recipe}/model.yaml", "--config", f"{recipe}/stage1.yaml"]
    command += ["--checkpoint.save", str(run), "--train-iters", "2"]
    variables = {"ONE_NODE": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    variables["MASTER_PORT"] = str(free_port())
    done = subprocess.run(
        command,
        env={**cluster.environment, **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 0 of 2, started by srun" in done.stdout
    assert "meeting the others at localhost:" in done.stdout
    assert "2 ranks = tensor 2" in done.stdout
    assert json.loads((run / "exit_reason.json").read_text())["reason"] == "finished"


def test_stage_must_be_named(cluster: Cluster) -> None:
    del cluster.environment["STAGE"]
    assert cluster.run() != 0
    assert "set STAGE" in cluster.log()


def test_stages_wait_for_one_another(cluster: Cluster) -> None:
    command = ["bash", SLURM / "submit_stages.sh", "--nodes", "4", "--", "--training.seed", "7"]
    answer = subprocess.run(
        command, env=cluster.environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split("\n")[:3] == [
        "stage1: job 101",
        "stage2: job 102",
        "stage3: job 103",
    ]
    first, second, third = cluster.noted("sbatch")
    assert "--dependency" not in first
    assert "--dependency=afterok:101 --kill-on-invalid-dep=yes" in second
    assert "--dependency=afterok:102 --kill-on-invalid-dep=yes" in third
    for stage, call in zip(("stage1", "stage2", "stage3"), (first, second, third), strict=True):
        assert call.startswith(f"{stage} --parsable --job-name dattn-{stage}")
        assert call.endswith(f"--nodes 4 {SLURM}/train.sbatch --training.seed 7")


def test_batch_script_asks_slurm_for_time_to_save() -> None:
    """The grace that torchrun gives lies inside the time between the signal and the limit."""
    script = (SLURM / "train.sbatch").read_text()
    options = [line.split()[1] for line in script.splitlines() if line.startswith("#SBATCH")]
    assert "--signal=B:TERM@300" in options
    assert "--requeue" in options
    assert "--ntasks-per-node=1" in options
    assert "GRACE_SECONDS:-270" in script

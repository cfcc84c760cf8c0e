"""The Slurm scripts under stand-ins for Slurm's commands.

`srun` starts the command once per task, all of them here, and kills its step on SIGTERM; `scancel`
signals every process of a step, loader workers included; `scontrol` names hosts and notes requeues;
`sbatch` notes submissions. That is how the real ones act, as far as the scripts rely on it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.unit.data.builders import make_dataset, make_records, save_processor

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "examples" / "slurm"
TRAIN_ITERS = 60

STANDINS = {
    "srun": """
import os, signal, subprocess, sys
arguments = sys.argv[1:]
while arguments[0].startswith("--"):
    arguments.pop(0)
tasks = int(os.environ["SLURM_NNODES"])
os.environ.update(
    SLURM_STEP_ID="0",
    SLURM_STEP_NUM_TASKS=str(tasks),
    SLURM_NTASKS=str(tasks),
    SLURM_STEP_NODELIST=os.environ["HOSTS"],
)
def start(task):
    local = task if os.environ.get("ONE_NODE") else 0
    numbers = {"SLURM_NODEID": task - local, "SLURM_PROCID": task, "SLURM_LOCALID": local}
    place = {name: str(number) for name, number in numbers.items()}
    return subprocess.Popen(arguments, env={**os.environ, **place})
nodes = [start(task) for task in range(tasks)]
with open(os.environ["NOTES"] + "/step", "w") as step:
    step.write(" ".join(str(node.pid) for node in nodes))
def kill_step(*_):
    for node in nodes:
        node.kill()
signal.signal(signal.SIGTERM, kill_step)
sys.exit(max(node.wait() for node in nodes))
""",
    "scancel": """
import os, psutil, signal, sys
option, step = sys.argv[1:]
assert step == os.environ["SLURM_JOB_ID"] + ".0", sys.argv
number = signal.Signals["SIG" + option.removeprefix("--signal=")]
with open(os.environ["NOTES"] + "/scancel", "a") as calls:
    print(option, file=calls)
for pid in open(os.environ["NOTES"] + "/step").read().split():
    try:
        node = psutil.Process(int(pid))
        for process in [*node.children(recursive=True), node]:
            process.send_signal(number)
    except psutil.NoSuchProcess:
        pass
""",
    "scontrol": """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    assert sys.argv[3] == os.environ["SLURM_JOB_NODELIST"]
    print("127.0.0.1\\nnode-1")
else:
    with open(os.environ["NOTES"] + "/scontrol", "a") as calls:
        print(*sys.argv[1:], file=calls)
""",
    "sbatch": """
import os, sys
path = os.environ["NOTES"] + "/sbatch"
with open(path, "a") as calls:
    print(os.environ["STAGE"], *sys.argv[1:], file=calls)
print(100 + len(open(path).readlines()), end=";cluster\\n")
""",
    # Replaces the real one in the tests that look at the batch script alone.
    "torchrun": """
import json, os, sys
node = os.environ["SLURM_NODEID"]
with open(os.environ["NOTES"] + "/torchrun-" + node, "w") as call:
    json.dump({"arguments": sys.argv[1:], "port": os.environ["MASTER_PORT"]}, call)
reason = os.environ.get("ENDING")
if reason:
    folder = sys.argv[sys.argv.index("--checkpoint.save") + 1]
    with open(folder + "/exit_reason.json", "w") as file:
        json.dump({"reason": reason, "step": 3}, file)
if code := os.environ.get("ERROR_CODE"):
    logs = sys.argv[sys.argv.index("--log-dir") + 1] + "/run/attempt_0/0"
    os.makedirs(logs)
    with open(logs + "/error.json", "w") as file:
        json.dump({"message": {"message": "no", "errorCode": int(code)}}, file)
if os.environ.get("DEAF"):  # a rank that hangs does not end at SIGTERM
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(os.environ["NOTES"] + "/deaf-" + node, "w").close()
    time.sleep(120)
sys.exit(int(os.environ.get("STATUS", "0")))
""",
}


class Cluster:
    """A folder with the stand-ins, and the environment that a job of two nodes finds."""

    def __init__(self, folder: Path, *, real_torchrun: bool) -> None:
        self.folder = folder
        self.notes = folder / "notes"
        self.notes.mkdir()
        programs = folder / "bin"
        programs.mkdir()
        for name, source in STANDINS.items():
            if name != "torchrun" or not real_torchrun:
                (programs / name).write_text(f"#!{sys.executable}\n{source}")
                (programs / name).chmod(0o755)
        path = (str(programs), str(Path(sys.executable).parent), os.environ["PATH"])
        self.environment = {
            "PATH": os.pathsep.join(path),
            "HOME": str(folder),
            "NOTES": str(self.notes),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NODELIST": "node-[0-1]",
            "SLURM_NNODES": "2",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": "0",  # a batch script has it, too
            "SLURM_LOCALID": "0",
            "HOSTS": "localhost",
            "WORK_DIR": str(folder),
            "GPUS_PER_NODE": "1",
            "OMP_NUM_THREADS": "1",
            "STAGE": "stage1",
        }
        self.jobs: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start the batch script; its output is appended to `job.log`, as Slurm does."""
        with (self.folder / "job.log").open("ab") as log:
            job = subprocess.Popen(
                ["bash", SLURM / "train.sbatch", *arguments],
                env={**self.environment, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.jobs.append(job)
        return job

    def run(self, *arguments: str, **environment: str) -> int:
        return self.start(*arguments, **environment).wait(timeout=240)

    def close(self) -> None:
        """End what a failed test left running."""
        for job in self.jobs:
            if job.poll() is None:
                left = psutil.Process(job.pid).children(recursive=True)
                for process in [*left, job]:
                    process.kill()
                job.wait()

    def log(self) -> str:
        return (self.folder / "job.log").read_text(errors="replace")

    def noted(self, name: str) -> list[str]:
        """Lines that a stand-in wrote down."""
        path = self.notes / name
        return path.read_text().splitlines() if path.exists() else []

    def exit_reason(self, stage_folder: Path) -> dict:
        return json.loads((stage_folder / "exit_reason.json").read_text())


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


def write_recipe(folder: Path) -> None:
    processor = save_processor(folder / "tokenizer")
    train = make_dataset(folder / "data", make_records(folder / "data", 60))
    recipe = folder / "recipe"
    recipe.mkdir()
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {"hidden_size": 16, "image_size": 16, "patch_size": 8, **layers}
    language = {"hidden_size": 16, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 512}
    sections = {
        "model": {"vision": vision, "language": {**language, **layers}},
        "data": {"tokenizer": str(processor)},
    }
    (recipe / "model.yaml").write_text(yaml.safe_dump(sections))
    stage = {
        "data": {
            "train": [{"path": train.path}],
            "visual_budget": 16,
            "text_budget": 256,
            "num_workers": 1,  # a process that is signalled too and must not die of it
        },
        "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "training": {
            "stage": "stage1",
            "train_iters": TRAIN_ITERS,
            "micro_batch_size": 2,
            "global_batch_size": 2,
        },
        "execution": {"precision": "fp32"},
        "checkpoint": {"save_interval": 20},
        "logging": {"log_interval": 1},
    }
    (recipe / "stage1.yaml").write_text(yaml.safe_dump(stage))


def wait_for(condition: object, job: subprocess.Popen[bytes], seconds: float = 180) -> bool:
    """Whether a condition came true while the job was running."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and job.poll() is None:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


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


def start_attempt(cluster: Cluster, number: int, **variables: str) -> subprocess.Popen[bytes]:
    """Start the job for the first time, or as Slurm does when it was requeued."""
    variables |= {"RECIPE": str(cluster.folder / "recipe"), "MASTER_PORT": str(free_port())}
    return cluster.start(SLURM_RESTART_COUNT=str(number), **variables)


def newest_step(stage: Path) -> int:
    return max((int(path.name[5:]) for path in stage.glob("step-???????")), default=0)


def assert_goes_on_from(step: int, log: str) -> None:
    assert f"iteration {step + 1:2d}/{TRAIN_ITERS} |" in log
    assert f"iteration {step:2d}/{TRAIN_ITERS} |" not in log


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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

"""The Slurm scripts under stand-ins for Slurm's commands.

`srun` starts the command once per node, all of them here, and kills its step on SIGTERM; `scancel`
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

from tests.unit.data.builders import make_dataset, make_rows, save_processor

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "examples" / "slurm"
TRAIN_ITERS = 150

STANDINS = {
    "srun": """
import os, signal, subprocess, sys
arguments = sys.argv[1:]
while arguments[0].startswith("--"):
    arguments.pop(0)
nodes = [
    subprocess.Popen(arguments, env={**os.environ, "SLURM_NODEID": str(node)})
    for node in range(int(os.environ["SLURM_NNODES"]))
]
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
assert sys.argv[1:] == ["--signal=TERM", os.environ["SLURM_JOB_ID"] + ".0"], sys.argv
for pid in open(os.environ["NOTES"] + "/step").read().split():
    node = psutil.Process(int(pid))
    for process in [*node.children(recursive=True), node]:
        process.send_signal(signal.SIGTERM)
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
    train = make_dataset(folder / "data", make_rows(folder / "data", 60))
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
            "precision": "fp32",
        },
        "checkpoint": {"save_interval": 0},
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


def test_job_is_preempted_saves_requeues_and_resumes(training_cluster: Cluster) -> None:
    """Two nodes of one rank each, tensor parallel across them: SIGTERM to the batch script."""
    cluster = training_cluster
    recipe = {"RECIPE": str(cluster.folder / "recipe"), "MASTER_PORT": str(free_port())}
    stage = cluster.folder / "checkpoints" / "recipe" / "stage1"

    job = cluster.start(**recipe)
    assert wait_for(lambda: "| lm loss:" in cluster.log(), job), cluster.log()
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=120) == 75, cluster.log()
    ending = cluster.exit_reason(stage)
    assert ending["reason"] == "signal"
    step = ending["step"]
    assert 0 < step < TRAIN_ITERS
    assert json.loads((stage / "latest.json").read_text())["step"] == step
    assert cluster.noted("scontrol") == ["requeue 12345"]
    logs = cluster.folder / "logs" / "recipe" / "stage1" / "job-12345-0"
    assert len(list(logs.glob("node-0/*/attempt_0/0/stdout.log"))) == 1
    assert len(list(logs.glob("node-1/*/attempt_0/0/stdout.log"))) == 1

    before = len(cluster.log())
    assert cluster.run(SLURM_RESTART_COUNT="1", **recipe) == 0, cluster.log()
    again = cluster.log()[before:]
    assert cluster.exit_reason(stage)["reason"] == "finished"
    assert f"iteration {step + 1:3d}/{TRAIN_ITERS} |" in again
    assert f"iteration {step:3d}/{TRAIN_ITERS} |" not in again
    assert cluster.noted("scontrol") == ["requeue 12345"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_all_nodes_meet_at_the_first_host(cluster: Cluster) -> None:
    assert cluster.run("--training.seed", "7") == 0
    calls = [json.loads(cluster.noted(f"torchrun-{node}")[0]) for node in (0, 1)]
    for node, call in enumerate(calls):
        words = " ".join(call["arguments"])
        assert f"--nnodes 2 --node-rank {node} --master-addr 127.0.0.1" in words
        assert call["port"] == str(20000 + 12345 % 12000)
        assert "--nproc-per-node 1" in words
        assert "--shutdown-timeout 270" in words
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
        ("", "1", "0", 1, False),  # died without a word
    ],
)
def test_only_a_stopped_stage_returns_to_the_queue(
    cluster: Cluster, ending: str, status: str, restarts: str, code: int, requeued: bool
) -> None:
    environment = {"ENDING": ending, "STATUS": status, "SLURM_RESTART_COUNT": restarts}
    assert cluster.run(**environment) == code, cluster.log()
    assert cluster.noted("scontrol") == (["requeue 12345"] if requeued else [])


def test_a_former_ending_is_not_believed(cluster: Cluster) -> None:
    """A job that dies without a word must not be requeued for its predecessor's reason."""
    folder = cluster.folder / "checkpoints" / "mistral_7b" / "stage1"
    folder.mkdir(parents=True)
    (folder / "exit_reason.json").write_text('{"reason": "signal", "step": 1}')
    assert cluster.run(STATUS="1") == 1
    assert cluster.noted("scontrol") == []


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

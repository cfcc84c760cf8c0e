"""A cluster of stand-ins for Slurm's commands, for tests of its scripts.

`srun` starts the command once per task, all of them here, and kills its step on SIGTERM; `scancel`
signals every process of a step, loader workers included; `scontrol` names hosts and notes requeues;
`sbatch` notes submissions. That is how the real ones act, as far as the scripts rely on it.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from tests.unit.data.builders import make_dataset, make_records, save_processor

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "examples" / "slurm"
TRAIN_ITERS = 150  # more than are done between a look at them and a signal

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
    enter = os.environ.get(f"ENTER_NODE_{task}", "").split()  # a host of its own: hosts.py
    return subprocess.Popen([*enter, *arguments], env={**os.environ, **place})
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
    print(os.environ["HOST_NAMES"])
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
            "HOST_NAMES": "127.0.0.1\nnode-1",
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


def start_attempt(
    cluster: Cluster, number: int, *arguments: str, **variables: str
) -> subprocess.Popen[bytes]:
    """Start the job for the first time, or as Slurm does when it was requeued."""
    variables |= {"RECIPE": str(cluster.folder / "recipe"), "MASTER_PORT": str(free_port())}
    return cluster.start(*arguments, SLURM_RESTART_COUNT=str(number), **variables)


def newest_step(stage: Path) -> int:
    return max((int(path.name[5:]) for path in stage.glob("step-???????")), default=0)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

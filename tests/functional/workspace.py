"""A folder with everything that `pretrain_vlm.py` needs, tiny, and ways to start it."""

import contextlib
import importlib.util
import io
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.unit.data.builders import make_dataset, make_records, save_processor

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 512

# 16 pixels, patches of 8: an image is four visual tokens.
MODEL: dict[str, Any] = {
    "attention": "dattn",
    "vision": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 8,
    },
    "adapter": {"max_grid": 4},
    "language": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "vocab_size": VOCAB_SIZE,
        "rope_theta": 10000.0,
    },
}


@dataclass(frozen=True)
class Workspace:
    """Paths of one tiny project."""

    folder: Path
    config: Path

    def flags(self, run: str = "run", **settings: Any) -> list[str]:
        """Command line of one run; settings are flags in Megatron's spelling."""
        folder = self.folder / run
        line = ["--config", str(self.config), "--checkpoint.save", str(folder)]
        line += ["--logging.sample_ledger", str(folder / "ledger")]
        for name, value in settings.items():
            line += [f"--{name.replace('_', '-')}", str(value)]
        return line


def make_workspace(folder: Path, *, precision: str = "fp32", **training: Any) -> Workspace:
    """Data, tokenizer and configuration of a run of 8 steps of 8 samples."""
    processor = save_processor(folder / "tokenizer")
    train = make_dataset(folder / "data", make_records(folder / "data", 40), "train")
    validation = make_dataset(folder / "data", make_records(folder / "data", 9), "validation")
    settings = {
        "model": MODEL,
        "data": {
            "train": [{"path": train.path}],
            "validation": [{"path": validation.path}],
            "tokenizer": str(processor),
            "visual_budget": 16,
            "text_budget": 160,
            "packing_buffer_size": 8,
            "num_workers": 0,
        },
        "optimizer": {
            "learning_rates": {"vision_model": 1e-3, "adapter": 2e-3, "language_model": 1e-3}
        },
        "parallel": {"distributed_timeout_minutes": 1.0},
        "training": {
            "train_iters": 8,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            **training,
        },
        "execution": {"precision": precision},
        "checkpoint": {"save_interval": 2},
        "logging": {"log_interval": 1},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    return Workspace(folder, config)


def command(flags: list[str], ranks: int) -> list[str]:
    """`python pretrain_vlm.py` for 0 ranks, else torchrun with that many."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [*launcher, str(ROOT / "pretrain_vlm.py"), *flags]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def pretrain(
    flags: list[str], *, ranks: int = 0, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run to the end; output is captured."""
    return subprocess.run(
        command(flags, ranks),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def start_pretraining(flags: list[str], *, ranks: int, log: Path) -> subprocess.Popen[bytes]:
    """Start in a process group of its own, output into a file."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            command(flags, ranks),
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run_main(argv: list[str]) -> tuple[int, str]:
    """The entry script on the ranks of `run_distributed`: exit code and standard error."""
    spec = importlib.util.spec_from_file_location("pretrain_vlm", ROOT / "pretrain_vlm.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    handlers = logging.getLogger().handlers[:]
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return script.main(argv), stderr.getvalue()
    finally:
        logging.getLogger().handlers[:] = handlers


def run_mains(argvs: list[list[str]]) -> list[tuple[int, str]]:
    """As `run_main` on one rank, once for each command line, one after the other."""
    return [run_main(argv) for argv in argvs]

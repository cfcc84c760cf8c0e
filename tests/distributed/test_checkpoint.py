"""Checkpoints of real training runs: exact resume, other parallel layouts, failures on one rank."""

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_dattn.checkpoint import commit, files, find_checkpoint, writer
from megatron_dattn.errors import CheckpointError
from tests.support.checkpoint_run import Run, Setup
from tests.support.distributed import run_distributed


def train_and_resume(folder: str, setup: Setup) -> tuple[list, list, dict, dict]:
    """Train 3 + 3 steps at once, and 3 steps in a new run resumed from the middle."""
    first = Run(setup)
    first.train(3)
    first.checkpointer(folder).save(first.state)
    expected = first.train(3)

    second = Run(setup, seed=99)  # other random states: only the checkpoint can set them right
    second.train(1)
    assert second.checkpointer(folder).resume(second.state)
    assert second.state.progress.step == 3
    return expected, second.train(3), first.digests(), second.digests()


def resume_each(folder: str, setups: list[Setup]) -> list[tuple]:
    return [train_and_resume(f"{folder}/{i}", setup) for i, setup in enumerate(setups)]


def assert_each_resumes_exactly(folder: Path, setups: list[Setup], ranks: int = 2) -> None:
    for results in run_distributed(resume_each, ranks, str(folder), setups, timeout=180):
        for setup, (expected, losses, before, after) in zip(setups, results, strict=True):
            assert losses == expected, setup
            assert after == before, setup


KINDS = [
    {"bf16": bf16, "distributed_optimizer": distributed_optimizer}
    for bf16 in (False, True)
    for distributed_optimizer in (False, True)
]


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    assert_each_resumes_exactly(tmp_path, [Setup(**kind) for kind in KINDS])


def test_resume_of_pipeline_stages_with_empty_groups(tmp_path: Path) -> None:
    """Vision encoder and adapter are on the first stage only; with the adapter alone to train, the
    last stage trains nothing at all."""
    rates = [(1e-3, 2e-2, 5e-3), (0.0, 1e-2, 0.0)]
    setups = [Setup(pipeline_parallel=2, rates=r, **kind) for r in rates for kind in KINDS]
    assert_each_resumes_exactly(tmp_path, setups)


@pytest.mark.parametrize("encoder_tp_mode", ["data", "weights"])
def test_resume_of_a_distributed_optimizer_beside_tensor_parallelism(
    tmp_path: Path, encoder_tp_mode: str
) -> None:
    """Ranks hold a share of the moments of weights that are shards, or the same as another's."""
    setup = Setup(
        tensor_parallel=2, bf16=True, distributed_optimizer=True, encoder_tp_mode=encoder_tp_mode
    )
    assert_each_resumes_exactly(tmp_path, [setup], ranks=4)


LAYOUTS = {"TP2": (2, 1), "DP2": (1, 1), "PP2": (1, 2), "TP2, cut encoder": (2, 1)}
CHANGES = [
    *(("TP2", "DP2"), ("DP2", "TP2"), ("PP2", "DP2"), ("TP2", "PP2")),
    *(("TP2, cut encoder", "TP2"), ("TP2", "TP2, cut encoder"), ("TP2, cut encoder", "DP2")),
]


def change_layouts(folder: str, bf16: bool, distributed_optimizer: bool) -> list[tuple]:
    """Per change of layout: tensors of the first layout's checkpoint, those of a checkpoint that
    the second layout saves at once after resuming, and both layouts' next losses."""
    results = []
    for source, target in CHANGES:
        place = Path(folder) / f"{source}-{target}"
        runs = []
        for name in (source, target):
            tensor, pipeline = LAYOUTS[name]
            setup = Setup(
                tensor_parallel=tensor,
                pipeline_parallel=pipeline,
                bf16=bf16,
                distributed_optimizer=distributed_optimizer,
                encoder_tp_mode="weights" if "cut" in name else "data",
                with_loader=False,
            )
            run = Run(setup)
            if not runs:
                run.train(2)
            else:
                assert run.checkpointer(place / source).resume(run.state)
            path = run.checkpointer(place / name).save(run.state)
            stored = dist_checkpointing.load_plain_tensors(str(path))
            tensors = {k: v for k, v in stored.items() if isinstance(v, torch.Tensor)}
            runs.append((tensors, run.train(2)))
            if runs[1:]:
                report = json.loads((place / source / "resume_report.json").read_text())
                fresh = report["random_state"].startswith("fresh, as the parallel layout changed")
                assert fresh is (LAYOUTS[source] != LAYOUTS[target])
        results.append(runs)
    return results


@pytest.mark.parametrize(
    ("bf16", "distributed_optimizer"), [(False, False), (True, True)], ids=["plain", "distributed"]
)
def test_another_layout_resumes_the_same_weights_and_moments(
    tmp_path: Path, bf16: bool, distributed_optimizer: bool
) -> None:
    first, second = run_distributed(
        change_layouts, 2, str(tmp_path), bf16, distributed_optimizer, timeout=300
    )
    for change, (saved, expected), (again, losses), other in zip(
        CHANGES, *zip(*first, strict=True), second, strict=True
    ):
        assert saved.keys() == again.keys(), change
        assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in saved)
        for key, tensor in saved.items():
            assert torch.equal(tensor, again[key]), (change, key)
        # Only the last stage sees a loss; the sums over shards are rounded in another order.
        expected = [max(pair) for pair in zip(expected, other[0][1], strict=True)]
        losses = [max(pair) for pair in zip(losses, other[1][1], strict=True)]
        assert losses == pytest.approx(expected, rel=2e-2 if bf16 else 1e-5), change


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    return fail


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
# Where it strikes, on which rank, with what, and what the error says.
FAULTS = {
    "first look": (commit, "_prepare", 0, PermissionError(13, "Permission denied"), "Permission"),
    "temporary folder": (commit, "_make_temporary", 0, NO_SPACE, "No space left"),
    "common state": (writer, "_write_common", 0, NO_SPACE, "disk full"),
    "shard of rank 0": (writer.dcp.FileSystemWriter, "write_data", 0, NO_SPACE, "disk full"),
    "shard of rank 1": (writer.dcp.FileSystemWriter, "write_data", 1, NO_SPACE, "disk full"),
    "index": (writer.dcp.FileSystemWriter, "finish", 0, NO_SPACE, "disk full"),
    "format marker": (writer, "_write_marker", 0, NO_SPACE, "disk full"),
    "extra file": (commit, "_write_extra", 1, NO_SPACE, "disk full"),
    "hash": (commit, "_hash_own", 1, OSError(errno.EIO, "Input/output error"), "Input/output"),
    "manifest": (commit, "write_manifest", 0, NO_SPACE, "disk full"),
    "rename": (commit, "_commit", 0, OSError(errno.EIO, "Input/output error"), "Input/output"),
    "memory": (commit, "_hash_own", 1, MemoryError(), "not enough memory"),
    "memory for a shard": (
        writer.dcp.FileSystemWriter,
        "write_data",
        1,
        MemoryError(),
        "ulimit -v",
    ),
    "thread": (commit, "_hash_own", 0, RuntimeError("can't start new thread"), "ulimit -u"),
    "quota": (commit, "_write_extra", 1, OSError(errno.EDQUOT, "Disk quota exceeded"), "quota of"),
    "file handle": (commit, "_write_extra", 0, OSError(errno.EMFILE, "Too many open files"), "-n"),
    "bug": (commit, "_hash_own", 1, TypeError("a bug"), "TypeError: a bug"),
}


def fail_at_every_point(folder: str) -> dict[str, str]:
    run = Run(Setup(tensor_parallel=2))  # both ranks have shards to write
    run.train(1)
    checkpointer = run.checkpointer(folder)
    checkpointer.save(run.state)
    run.train(1)
    messages = {}
    for name, (owner, function, rank, error, _) in FAULTS.items():
        if rank == dist.get_rank():
            replacement = mock.patch.object(owner, function, raising(error))
        else:
            replacement = mock.patch.object(owner, "nothing_here", create=True)
        with replacement, pytest.raises(CheckpointError) as failure:
            checkpointer.save(run.state)
        messages[name] = str(failure.value)
        dist.barrier()
        assert find_checkpoint(folder).step == 1
        names = {entry.name for entry in Path(folder).iterdir()}
        assert names == {"step-0000001", "latest.json"}, name
        dist.barrier()
    assert checkpointer.save(run.state).name == "step-0000002"
    return messages


def test_a_failure_of_one_rank_is_one_error_on_all(tmp_path: Path) -> None:
    first, second = run_distributed(fail_at_every_point, 2, str(tmp_path))
    assert first == second
    for name, (*_, rank, _error, text) in FAULTS.items():
        assert text in first[name], name
        assert f"rank {rank}:" in first[name], name
    assert find_checkpoint(tmp_path).step == 2


def limit_file_size_on_rank_1(folder: str) -> str:
    run = Run(Setup(distributed_optimizer=True))
    run.train(1)
    checkpointer = run.checkpointer(folder)
    path = checkpointer.save(run.state)
    largest = max(file.stat().st_size for file in path.glob("__*"))
    run.train(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 0:
        # Both ranks hold replicas, and rank 0 writes them all.
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, hard))
    try:
        with pytest.raises(CheckpointError) as failure:
            checkpointer.save(run.state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpointer.save(run.state)
    return str(failure.value)


def test_a_real_write_error_while_the_shards_are_written(tmp_path: Path) -> None:
    first, second = run_distributed(limit_file_size_on_rank_1, 2, str(tmp_path))
    assert first == second
    assert "disk full" not in first
    assert f"File too large: '{tmp_path}/step-0000002/__0_0.distcp'" in first
    assert "raise ulimit -f" in first
    assert "the previous checkpoint stays the latest" in first
    assert not [name for name in os.listdir(tmp_path) if files.is_temporary(name)]


def resume_past_a_damaged_checkpoint(folder: str) -> tuple[int, str]:
    run = Run(Setup())
    for _ in range(2):
        run.train(1)
        path = run.checkpointer(folder).save(run.state)
    if dist.get_rank() == 0:
        victim = path / "rng-00001.pt"
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    dist.barrier()
    other = Run(Setup(), seed=5)
    assert other.checkpointer(folder).resume(other.state)
    report = json.loads((Path(folder) / "resume_report.json").read_text())
    other.train(1)
    other.checkpointer(folder).save(other.state)  # step 2 again: the damaged one steps aside
    return other.state.progress.step, report["passed_over"][0]


def test_a_damaged_checkpoint_is_passed_over_on_all_ranks(tmp_path: Path) -> None:
    for step, reason in run_distributed(resume_past_a_damaged_checkpoint, 2, str(tmp_path)):
        assert step == 2
        assert "step-0000002/rng-00001.pt is damaged" in reason
    assert find_checkpoint(tmp_path).step == 2
    assert [name for name in os.listdir(tmp_path) if ".damaged-" in name]

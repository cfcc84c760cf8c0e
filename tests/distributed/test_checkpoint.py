"""Checkpoints of real training runs: exact resume, other parallel layouts, failures on one rank."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values

from megatron_dattn.checkpoint import commit, files, find_checkpoint, writer
from megatron_dattn.errors import CheckpointError
from megatron_dattn.training import state
from megatron_dattn.training.checkpoint import Checkpointer
from megatron_dattn.training.flat_state import sharded_flat_state
from megatron_dattn.training.optimizer import single_optimizer
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


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    stored = dist_checkpointing.load_plain_tensors(str(path))
    return {k: v for k, v in stored.items() if isinstance(v, torch.Tensor)}


def gathered_state(optimizer: Any, model_state: Any, *, is_loading: bool, metadata: dict) -> Any:
    """The distributed optimizer's state as older versions saved it: gathered by megatron-core."""
    part = single_optimizer(optimizer)
    part.init_state_fn(part.optimizer, part.config)
    metadata = {**metadata, "distrib_optim_fully_reshardable_mem_efficient": True}
    state = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    if state["param_state"] is None:
        del state["param_state"]
    for shard in nested_values(state.get("param_state", {})):
        shard.replica_id = int(any(shard.replica_id[:-1]))  # no other rank has it any more
    return state


def switch_optimizers(folder: str, bf16: bool) -> list[str]:
    """Save with either optimizer (and as older versions did), go on with the other one."""
    wrong = []
    for name, distributed in (("plain", False), ("parts", True), ("gathered", True)):
        place = Path(folder) / name
        first = Run(Setup(bf16=bf16, distributed_optimizer=distributed))
        first.train(2)
        older = mock.patch.object(state, "sharded_optimizer_state", gathered_state)
        with older if name == "gathered" else contextlib.nullcontext():
            saved = tensors_of(first.checkpointer(place).save(first.state))
        expected = first.train(2)
        older_masters = {k for k in saved if k.startswith("optimizer.state.param.")}
        if (older_masters != set()) is not (name == "gathered"):
            wrong.append(f"{name} has {len(older_masters)} masters of older versions")
        for key in older_masters:
            masters = saved.pop(key)
            if bf16:
                saved[key.replace(".param.", ".fp32_param.")] = masters
        for target in (False, True):
            second = Run(Setup(bf16=bf16, distributed_optimizer=target), seed=99)
            second.train(1)
            assert second.checkpointer(place).resume(second.state)
            again = tensors_of(second.checkpointer(place / str(target)).save(second.state))
            if saved.keys() != again.keys():
                wrong.append(f"{name} to {target}: {sorted(saved.keys() ^ again.keys())}")
            wrong += [
                f"{name} to {target}: {key}"
                for key in saved.keys() & again.keys()
                if not torch.equal(saved[key], again[key])
            ]
            losses = second.train(2)
            if losses != pytest.approx(expected, rel=2e-2 if bf16 else 1e-5):
                wrong.append(f"{name} to {target}: {losses} instead of {expected}")
            groups = second.state.optimizer.chained_optimizers[0].optimizer.param_groups
            if {group["step"] for group in groups if group["params"]} != {4}:
                wrong.append(f"{name} to {target}: {[group['step'] for group in groups]}")
    return wrong


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_either_optimizer_goes_on_from_the_other_s_state(tmp_path: Path, bf16: bool) -> None:
    for ranks in (1, 2):
        for wrong in run_distributed(switch_optimizers, ranks, f"{tmp_path}/{ranks}", bf16):
            assert wrong == []


def other_sizes(folder: str, save: bool, tensor_parallel: int) -> dict[str, str]:
    """A sum over each tensor of a checkpoint that is saved, or saved at once after resuming."""
    setup = Setup(tensor_parallel, bf16=True, distributed_optimizer=True, with_loader=False)
    run = Run(setup, seed=1234 if save else 99)
    run.train(2 if save else 1)
    checkpointer = run.checkpointer(folder)
    if not save:
        assert checkpointer.resume(run.state)
        checkpointer = run.checkpointer(f"{folder}/{dist.get_world_size()}-{tensor_parallel}")
    stored = tensors_of(checkpointer.save(run.state))
    return {key: hashlib.sha256(repr(t.tolist()).encode()).hexdigest() for key, t in stored.items()}


def test_the_distributed_optimizer_s_state_loads_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    saved = run_distributed(other_sizes, 2, str(tmp_path), True, 1)[0]
    assert any(key.startswith("optimizer.state.fp32_param.") for key in saved)
    for ranks, tensor_parallel in ((1, 1), (2, 2), (4, 2)):
        again = run_distributed(other_sizes, ranks, str(tmp_path), False, tensor_parallel)[0]
        assert again == saved


def share_the_writing(folder: str) -> list[list[int]]:
    sizes = []
    for distributed in (False, True):
        run = Run(Setup(distributed_optimizer=distributed))
        run.train(1)
        path = run.checkpointer(f"{folder}/{distributed}").save(run.state)
        sizes.append([(path / f"__{rank}_0.distcp").stat().st_size for rank in range(2)])
    return sizes


def test_replicas_share_the_writing(tmp_path: Path) -> None:
    plain, distributed = run_distributed(share_the_writing, 2, str(tmp_path))[0]
    for first, second in (plain, distributed):
        # Whole tensors are dealt out, of which the tiny model has few; headers add to each.
        assert 0.45 < first / (first + second) < 0.55
    assert sum(plain) == pytest.approx(sum(distributed), rel=0.2)


def no_gathering(folder: str) -> int:
    """The bytes that a save of the distributed optimizer holds beyond its state."""
    run = Run(Setup(bf16=True, distributed_optimizer=True))
    run.train(1)
    refused = mock.patch.object(dist, "gather", side_effect=AssertionError("the state is gathered"))
    with refused, mock.patch.object(dist, "all_gather", side_effect=AssertionError):
        run.checkpointer(folder).save(run.state)
    part = single_optimizer(run.state.optimizer)
    held = {
        tensor.untyped_storage().data_ptr()
        for states in part.optimizer.state.values()
        for tensor in states.values()
    }
    held |= {
        parameter.untyped_storage().data_ptr()
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    }
    shards = sharded_flat_state(part, state.model_state(run.state.chunks)["model"])
    return sum(
        shard.data.nbytes
        for shard in nested_values(shards)
        if shard.data.untyped_storage().data_ptr() not in held
    )


def test_nothing_of_the_distributed_optimizer_is_gathered_or_copied(tmp_path: Path) -> None:
    assert run_distributed(no_gathering, 2, str(tmp_path)) == [0, 0]


def save_beside(folder: str, setup: Setup) -> tuple[list[float], list[float]]:
    """The same run twice: saved while training waits, and beside three more steps."""
    first = Run(setup)
    first.train(2)
    first.checkpointer(f"{folder}/sync").save(first.state)
    expected = first.train(3)
    second = Run(setup)
    second.train(2)
    checkpointer = second.checkpointer(f"{folder}/async")
    gate = threading.Event()
    write = writer.write_share

    def write_later(*arguments: Any) -> Any:
        assert gate.wait(60)
        return write(*arguments)

    with mock.patch.object(writer, "write_share", write_later):
        checkpointer.save(second.state, beside=True)
        losses = []
        for _ in range(3):
            losses += second.train(1)
            assert not checkpointer.advance()
        gate.set()
        checkpointer.finish()
    return expected, losses


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_save_beside_training_is_the_one_that_training_waits_for(
    tmp_path: Path, kind: dict[str, bool]
) -> None:
    for expected, losses in run_distributed(save_beside, 2, str(tmp_path), Setup(**kind)):
        assert losses == expected
    paths = [find_checkpoint(tmp_path / name).path for name in ("sync", "async")]
    files = [json.loads((path / "manifest.json").read_text())["files"] for path in paths]
    assert files[0].keys() == files[1].keys()
    assert {f"__{rank}_0.distcp" for rank in range(2)} <= files[0].keys()
    for name in files[0].keys() - {".metadata"}:  # that one holds an id of its own
        assert files[0][name] == files[1][name], name


def train_until_saved(run: Run, checkpointer: Checkpointer) -> None:
    while not checkpointer.advance():
        run.train(1)


def fail_beside(folder: str, rank: int) -> tuple[str, list[str]]:
    run = Run(Setup())
    run.train(1)
    checkpointer = run.checkpointer(folder)
    checkpointer.save(run.state)
    run.train(1)
    waits = threading.Event()

    def fail_or_hang(stream: Any, block: memoryview) -> None:
        """The rank that does not fail must hear of the other's failure while it writes."""
        with stream._failures_noted():
            if dist.get_rank() == rank:
                raise NO_SPACE
            while not stream._owner.cancelled.wait(0.01):
                waits.set()
            raise writer.SaveCancelledError

    with mock.patch.object(writer._WatchedStream, "_write_block", fail_or_hang):
        checkpointer.save(run.state, beside=True)
        with pytest.raises(CheckpointError) as failure:
            train_until_saved(run, checkpointer)
    assert waits.is_set() or dist.get_rank() == rank
    dist.barrier()
    names = sorted(os.listdir(folder))
    assert checkpointer.advance()
    dist.barrier()
    checkpointer.save(run.state)
    return str(failure.value), names


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_of_one_rank_ends_a_save_beside_training_on_all(
    tmp_path: Path, rank: int
) -> None:
    first, second = run_distributed(fail_beside, 2, str(tmp_path), rank)
    assert first == second
    text, names = first
    assert text.startswith(f"disk full: {tmp_path}/step-0000002 needs")
    assert f"rank {rank} (host " in text
    assert "): writing the shards failed: No space left on device" in text
    assert names == ["latest.json", "step-0000001"]


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
# Where it strikes, on which rank, with what, and what the error says.
FAULTS = {
    "first look": (commit, "_prepare", 0, PermissionError(13, "Permission denied"), "Permission"),
    "temporary folder": (commit, "_make_temporary", 0, NO_SPACE, "No space left"),
    "common state": (writer, "_write_common", 0, NO_SPACE, "disk full"),
    "shard of rank 0": (writer.ShardWriter, "_write_items", 0, NO_SPACE, "disk full"),
    "shard of rank 1": (writer.ShardWriter, "_write_items", 1, NO_SPACE, "disk full"),
    "index": (writer.dcp.FileSystemWriter, "finish", 0, NO_SPACE, "disk full"),
    "format marker": (writer, "_write_marker", 0, NO_SPACE, "disk full"),
    "extra file": (commit, "_write_extra", 1, NO_SPACE, "disk full"),
    "hash": (commit, "_hash_own", 1, OSError(errno.EIO, "Input/output error"), "Input/output"),
    "manifest": (commit, "write_manifest", 0, NO_SPACE, "disk full"),
    "rename": (commit, "_commit", 0, OSError(errno.EIO, "Input/output error"), "Input/output"),
    "memory": (commit, "_hash_own", 1, MemoryError(), "not enough memory"),
    "memory for a shard": (
        writer.ShardWriter,
        "_write_items",
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
        assert f"rank {rank} (host " in first[name], name
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

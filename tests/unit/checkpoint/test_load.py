"""Loading is strict, refuses before it writes, and never runs what a checkpoint contains."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

from megatron_dattn.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from megatron_dattn.checkpoint.load import read_common
from megatron_dattn.checkpoint.reader import read_metadata, stored_shapes
from megatron_dattn.errors import CheckpointError
from tests.unit.checkpoint.conftest import FACTS, small_state


def test_everything_comes_back(save: Callable[[int], Path]) -> None:
    request = small_state()
    live = request["model"]["body.weight"].data
    loaded = load_checkpoint(save(7), request)
    assert torch.equal(loaded["model"]["body.weight"], torch.full((4, 3), 7.0))
    assert torch.equal(loaded["model"]["head.weight"], torch.full((2, 4), 7.0))
    assert loaded["object"] == {"value": 7.0}
    assert loaded["schedule"] == {"num_steps": 7}
    assert torch.equal(live, torch.full((4, 3), 7.0))  # in place


def test_selected_modules_alone(save: Callable[[int], Path]) -> None:
    request = small_state()
    untouched = request["model"]["head.weight"].data
    loaded = load_checkpoint(save(7), request, modules=["body"])
    assert loaded["model"].keys() == {"body.weight", "body.bias"}
    assert torch.equal(untouched, torch.zeros(2, 4))


def test_keys_left_out_may_be_missing_on_either_side(save: Callable[[int], Path]) -> None:
    request = small_state()
    del request["model"]["body.bias"]
    scale = ShardedTensor.from_rank_offsets("body.scale", torch.ones(4))
    request["model"]["body.scale"] = scale
    loaded = load_checkpoint(
        save(7), request, modules=["body"], without=lambda key: key in ("body.bias", "body.scale")
    )
    assert loaded["model"].keys() == {"body.weight"}
    assert torch.equal(scale.data, torch.ones(4))


@pytest.mark.parametrize("modules", [None, ["body"]])
def test_what_does_not_fit_is_listed_and_nothing_is_touched(
    save: Callable[[int], Path], modules: list[str] | None
) -> None:
    request = small_state()
    model = request["model"]
    del model["body.bias"]
    model["body.scale"] = ShardedTensor.from_rank_offsets("body.scale", torch.zeros(4))
    model["body.weight"] = ShardedTensor.from_rank_offsets("body.weight", torch.zeros(4, 5))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(save(7), request, modules=modules)
    message = str(error.value)
    assert "1 keys are not in the checkpoint (body.scale)" in message
    assert "1 keys are not in the model (body.bias)" in message
    assert "1 tensors have another shape (body.weight (4, 3) instead of (4, 5))" in message
    for shard in model.values():
        assert not shard.data.any()


def test_transformer_engine_state_may_be_absent_or_additional(tmp_path: Path) -> None:
    state = small_state(3.0)
    state["model"]["old"] = ShardedObject("body.old._extra_state", None, (1,), (0,))
    path = save_checkpoint(tmp_path, 1, state, facts=FACTS)
    request = small_state()
    request["model"]["new"] = ShardedObject("body.new._extra_state", None, (1,), (0,))
    loaded = load_checkpoint(path, request)
    assert torch.equal(loaded["model"]["body.bias"], torch.full((4,), 3.0))
    assert "new" not in loaded["model"]


def test_shards_of_unequal_type_are_converted(save: Callable[[int], Path]) -> None:
    request = small_state()
    for key, shard in request["model"].items():
        data = shard.data.bfloat16()
        request["model"][key] = ShardedTensor.from_rank_offsets(shard.key, data)
    loaded = load_checkpoint(save(7), request)
    assert torch.equal(loaded["model"]["body.bias"], torch.full((4,), 7.0, dtype=torch.bfloat16))


def test_stored_shapes(save: Callable[[int], Path]) -> None:
    assert stored_shapes(read_metadata(save(1))) == {
        "body.weight": (4, 3),
        "body.bias": (4,),
        "head.weight": (2, 4),
        "object": None,
    }


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def as_pickle(bomb: Bomb) -> bytes:
    return pickle.dumps(bomb)


def as_archive(bomb: Bomb) -> bytes:
    buffer = io.BytesIO()
    torch.save([bomb], buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "make", "read"),
    [(".metadata", as_pickle, read_metadata), ("common.pt", as_archive, read_common)],
)
def test_a_malicious_file_runs_nothing(
    tmp_path: Path, name: str, make: Callable[[Bomb], bytes], read: Callable[[Path], Any]
) -> None:
    (tmp_path / name).write_bytes(make(Bomb(tmp_path / "marker")))
    with pytest.raises(CheckpointError, match="damaged"):
        read(tmp_path)
    assert not (tmp_path / "marker").exists()


def test_a_malicious_object_among_the_shards_runs_nothing(tmp_path: Path) -> None:
    state = small_state()
    bomb = Bomb(tmp_path / "marker")
    state["object"] = ShardedObject("object", bomb, (1,), (0,))
    path = save_checkpoint(tmp_path / "run", 1, state, facts=FACTS)
    with pytest.raises(CheckpointError, match=r"loading .* failed"):
        load_checkpoint(path, small_state())
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("content", [b"", b"abc", b"\x80\x04K\x01."])
@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_unreadable_files_are_one_clear_error(
    save: Callable[[int], Path], name: str, content: bytes
) -> None:
    path = save(1)
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path}/?{name}".replace(".", r"\.")):
        load_checkpoint(path, small_state())


def test_a_shard_that_cannot_be_read_is_one_clear_error(save: Callable[[int], Path]) -> None:
    path = save(1)
    (path / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"loading {path} failed"):
        load_checkpoint(path, small_state())


@pytest.mark.parametrize("target", [".", "__0_0.distcp", ".metadata"])
def test_a_checkpoint_that_everybody_may_write_is_refused(
    save: Callable[[int], Path], target: str
) -> None:
    path = save(1)
    writable = path / target
    writable.chmod(writable.stat().st_mode | 0o002)
    with pytest.raises(CheckpointError, match="not trusted"):
        load_checkpoint(path, small_state())


def test_a_bare_distributed_checkpoint_is_refused(
    tmp_path: Path, save: Callable[[int], Path]
) -> None:
    path = save(1)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint of this program"):
        load_checkpoint(path, small_state())
    with pytest.raises(CheckpointError):
        find_checkpoint(tmp_path)

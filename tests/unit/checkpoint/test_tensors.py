"""Parameters one at a time: out of damaged checkpoints too, and into checkpoints without memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from megatron_dattn.attention import PRESETS
from megatron_dattn.checkpoint import load_checkpoint, save_checkpoint, verify
from megatron_dattn.checkpoint.share import parameter_shards, values_by_name
from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.conversion.families.model_rules import export_rules
from megatron_dattn.errors import CheckpointError
from megatron_dattn.models.build import build_model
from megatron_dattn.models.config import VisionConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from tests.support.vlm import CLIP, FAMILIES, VISION, tiny_model, tiny_model_config
from tests.unit.checkpoint.conftest import FACTS, small_state


def test_values_stay_on_the_disk_until_they_are_loaded(save) -> None:
    path = save(3)
    stored = open_tensors(path)
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        "body.weight": (4, 3),
        "body.bias": (4,),
    }  # the manifest names no module but `body`
    shard = path / "__0_0.distcp"
    hidden = shard.rename(path / "hidden")
    with pytest.raises(CheckpointError, match=r"body\.bias cannot be read from .*__0_0\.distcp"):
        stored["body.bias"].load()
    hidden.rename(shard)
    assert torch.equal(stored["body.bias"].load(), torch.full((4,), 3.0))


def test_a_damaged_archive_is_one_error(save) -> None:
    path = save(3)
    stored = open_tensors(path)
    shard = path / "__0_0.distcp"
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(CheckpointError, match=r"body\.weight cannot be read"):
        stored["body.weight"].load()


def test_what_everybody_may_write_is_not_opened(save) -> None:
    path = save(3)
    (path / "__0_0.distcp").chmod(0o666)
    with pytest.raises(CheckpointError, match="not trusted"):
        open_tensors(path)


def test_a_checkpoint_without_some_chunks_is_refused(tmp_path: Path) -> None:
    state = {"weight": ShardedTensor.from_rank_offsets("body.weight", torch.ones(2, 3), (0, 1, 2))}
    other = {"weight": ShardedTensor.from_rank_offsets("body.weight", torch.ones(2, 3), (0, 0, 2))}
    path = save_checkpoint(tmp_path, 1, {"a": state, "b": other}, facts=FACTS)
    (tensor,) = open_tensors(path).values()
    assert torch.equal(tensor.load(), torch.ones(4, 3))
    tensor._stored.chunks.pop()
    with pytest.raises(CheckpointError, match=r"does not hold all of body\.weight"):
        tensor.load()


def joined(shard: ShardedTensor | ShardedTensorFactory) -> tuple[object, ...]:
    """Where a parameter lies in a checkpoint, though its model cuts it (gate and up projection)."""
    chunks = shard.build() if isinstance(shard, ShardedTensorFactory) else [shard]
    first = min(chunks, key=lambda chunk: chunk.global_offset)
    layers = first.prepend_axis_num
    return first.key, first.global_shape, first.global_offset, layers, first.dtype


@pytest.mark.parametrize(
    ("preset", "language"),
    [
        *((preset, {}) for preset in PRESETS),
        *(("dattn", {"family": family}) for family in FAMILIES),
        ("dattn", {"tie_word_embeddings": True}),
    ],
)
@pytest.mark.parametrize("vision", [VISION, CLIP], ids=["siglip", "clip"])
def test_parameters_have_the_keys_of_the_model(
    preset: str, language: dict[str, Any], vision: VisionConfig
) -> None:
    """The families' maps and this module say together what megatron-core's model says."""
    config = tiny_model_config(preset, vision=vision, **language)
    model = build_model(config, ParallelConfig(), ExecutionConfig(), device="meta")
    state = model.sharded_state_dict()
    expected = {name: joined(state[name]) for name, _ in model.named_parameters()}
    shapes = {rule.megatron: rule.shape for rule in export_rules(config)}
    shards = parameter_shards(shapes, torch.bfloat16)
    assert {name: joined(shard) for name, shard in shards.items()} == expected


def test_a_model_without_memory_is_written_parameter_by_parameter(tmp_path: Path) -> None:
    """Gate and up projection, layers and all: what is loaded again is what was handed over."""
    model = tiny_model()
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    asked: list[str] = []

    def load(name: str) -> Tensor:
        asked.append(name)
        return whole[name]

    shapes = {name: tuple(value.shape) for name, value in whole.items()}
    shards = parameter_shards(shapes, torch.float32)
    values = values_by_name(shards, load)
    facts = {"modules": ["vision_model", "adapter", "language_model"]}
    path = save_checkpoint(tmp_path, 1, {"model": dict(shards)}, facts=facts, values=values)
    assert sorted(asked) == sorted(whole), "each parameter once"
    verify(path)  # the sums that were made on the way to the disk
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    loaded = load_checkpoint(path, {"model": model.sharded_state_dict()})["model"]
    for name, value in whole.items():
        assert torch.equal(loaded[name], value), name


def test_a_failing_read_leaves_no_checkpoint(tmp_path: Path) -> None:
    shards = parameter_shards({"body.a": (4, 2), "body.b": (4, 2)}, torch.float32)

    def load(name: str) -> Tensor:
        if name == "body.b":
            raise OSError(5, "Input/output error")
        return torch.ones(4, 2)

    values = values_by_name(shards, load)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_checkpoint(tmp_path, 1, {"model": dict(shards)}, facts=FACTS, values=values)
    assert list(tmp_path.iterdir()) == []


def test_sums_are_those_of_the_files(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, small_state(1.5), facts=FACTS)
    assert set(verify(path).files) == {entry.name for entry in path.iterdir()} - {"manifest.json"}

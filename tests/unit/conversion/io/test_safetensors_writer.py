"""What is written is safetensors, for the format's own library as for our reader."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from megatron_dattn.conversion.io.safetensors_reader import SafetensorsFolder
from megatron_dattn.conversion.io.safetensors_writer import PlannedTensors, write_shards

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
PARTS = st.lists(st.tuples(DTYPES, st.lists(SHAPES, min_size=1, max_size=3)), min_size=1)


def planned_of(dtype: torch.dtype, tensors: dict[str, Tensor]) -> PlannedTensors:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return PlannedTensors(shapes, dtype, lambda: tensors)


@settings(deadline=None)  # files: their time is the disk's
@given(parts=PARTS, limit=st.integers(1, 1000))
def test_every_layout_comes_back(parts, limit):
    made = [
        {f"{number}.{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
        for number, (dtype, shapes) in enumerate(parts)
    ]
    planned = [planned_of(dtype, tensors) for (dtype, _), tensors in zip(parts, made, strict=True)]
    expected = {name: tensor for tensors in made for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, planned, limit)
        files = sorted(folder.glob("*.safetensors"))
        theirs = {name: tensor for file in files for name, tensor in load_file(file).items()}
        ours = SafetensorsFolder(folder)
        for read in (theirs, {name: ours.load(name) for name in ours.shapes}):
            assert read.keys() == expected.keys()
            for name, tensor in expected.items():
                assert read[name].dtype == tensor.dtype
                assert torch.equal(read[name], tensor), name


def test_pieces_of_a_larger_tensor_are_written_alone(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    pieces = {"rows": whole[1:], "columns": whole[:, ::2]}
    write_shards(tmp_path, [planned_of(torch.float32, pieces)], 10**6)
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], piece) for name, piece in pieces.items())
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * 14 + 250


def test_one_parameter_is_held_at_a_time(tmp_path):
    """Each is asked for once, in order, when its predecessor is in the file."""
    asked = []

    def make(number: int) -> dict[str, Tensor]:
        written = sum(file.stat().st_size for file in tmp_path.iterdir())
        asked.append((number, written))
        return {str(number): torch.full((1000, 1000), float(number))}

    planned = [
        PlannedTensors(
            {str(number): (1000, 1000)}, torch.float32, lambda number=number: make(number)
        )
        for number in range(4)
    ]
    write_shards(tmp_path, planned, 8 * 10**6)
    assert [number for number, _ in asked] == [0, 1, 2, 3]
    assert all(written >= number * 4 * 10**6 for number, written in asked)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 16 * 10**6
    assert index["weight_map"]["3"] == "model-00002-of-00002.safetensors"


def test_another_tensor_than_planned_is_our_mistake(tmp_path):
    part = PlannedTensors({"x": (2,)}, torch.float32, lambda: {"x": torch.ones(3)})
    with pytest.raises(AssertionError):
        write_shards(tmp_path, [part], 100)

"""Folders of safetensors: sharded, prefixed, damaged, pickled."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_dattn.conversion.io.hf_folder import read_json
from megatron_dattn.conversion.io.safetensors_reader import SafetensorsFolder
from megatron_dattn.errors import CheckpointError


def write_shards(folder):
    save_file({"a.x": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b.y": torch.zeros(3, 1)}, folder / "two.safetensors")
    index = {"weight_map": {"a.x": "one.safetensors", "b.y": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_reads_shards_and_single_files(tmp_path):
    write_shards(tmp_path)
    weights = SafetensorsFolder(tmp_path)
    assert weights.shapes == {"a.x": (2,), "b.y": (3, 1)}
    assert torch.equal(weights.load("b.y"), torch.zeros(3, 1))


def test_prefix_hides_everything_else(tmp_path):
    write_shards(tmp_path)
    weights = SafetensorsFolder(tmp_path, prefix="a.")
    assert weights.shapes == {"x": (2,)}
    assert torch.equal(weights.load("x"), torch.ones(2))


def test_missing_and_truncated_shards_are_named(tmp_path):
    write_shards(tmp_path)
    shard = tmp_path / "two.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=r"two\.safetensors is damaged"):
        SafetensorsFolder(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors is missing"):
        SafetensorsFolder(tmp_path)


def test_a_shard_that_shrinks_later_is_noticed(tmp_path):
    write_shards(tmp_path)
    weights = SafetensorsFolder(tmp_path)
    shard = tmp_path / "two.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=r"two\.safetensors ends inside of b\.y"):
        weights.load("b.y")


def write_index(folder, **weight_map):
    index = {"weight_map": {name.replace("_", "."): file for name, file in weight_map.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a_x": "one.safetensors"}, None),
        ({"a_x": "one.safetensors", "b_y": "three.safetensors"}, "three.safetensors is missing"),
        ({"a_x": "one.safetensors", "b_y": "one.safetensors"}, "one.* does not hold b.y"),
        ({"a_x": "one.safetensors", "c_z": "two.safetensors"}, "two.* does not hold c.z"),
        ({}, "lists no weights"),
    ],
)
def test_an_index_that_is_not_the_shards(tmp_path, index, message):
    write_shards(tmp_path)
    write_index(tmp_path, **index)
    if message is None:  # a shard that no index names is not looked at
        assert SafetensorsFolder(tmp_path).shapes == {"a.x": (2,)}
        return
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFolder(tmp_path)


def test_a_tensor_that_the_index_lacks_is_named(tmp_path):
    write_shards(tmp_path)
    save_file({"b.y": torch.zeros(3, 1), "b.z": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"does not list b\.z of two\.safetensors"):
        SafetensorsFolder(tmp_path)


def test_types_are_known_without_reading(tmp_path):
    save_file({"x": torch.ones(1, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert SafetensorsFolder(tmp_path).dtypes == {"x": "BF16"}


def test_pickled_weights_are_refused(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors only"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_broken_json_is_one_error(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match="JSON"):
        read_json(path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            r"holds model-00001.*, model-00002.*, but model\.safetensors\.index\.json is missing",
        ),
        (["consolidated.safetensors"], "holds consolidated.safetensors, which is Mistral's own"),
        (
            ["consolidated.safetensors", "model-00001-of-00001.safetensors"],
            r"holds model-00001-of-00001\.safetensors, but .* is missing",
        ),
        (["pytorch_model.bin"], r"holds pytorch_model\.bin, but .* safetensors only"),
        (["config.json"], r"holds no weights: neither model\.safetensors nor"),
    ],
)
def test_what_is_there_instead_of_weights_is_named(tmp_path, files, message):
    for name in files:
        save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFolder(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_mistral_s_own_file_beside_the_shards_is_left_alone(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not even looked at")
    assert SafetensorsFolder(tmp_path).shapes == {"a.x": (2,), "b.y": (3, 1)}

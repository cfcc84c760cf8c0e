"""Checkpoints that a person has made: every sum is right, and what they say is not believed.

Only plain files of the folder are read, every field is of its type, and no code runs.
"""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dattn.checkpoint import find_checkpoint, load_checkpoint, verify
from megatron_dattn.checkpoint.manifest import read_listed, read_manifest
from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.errors import CheckpointError
from megatron_dattn.runtime.random_states import capture_rng, restore_rng
from tests.support.forged_checkpoints import RunsCode, forge_file, forge_index, forge_manifest
from tests.unit.checkpoint.conftest import small_state


@pytest.fixture
def folder(tmp_path: Path, fill: Callable[..., None]) -> Path:
    fill(1, 2)
    return tmp_path / "step-0000002"


def test_a_forged_checkpoint_that_is_right_is_taken(folder: Path) -> None:
    forge_manifest(folder, lambda body: body["facts"].update(remark=["mine"]))
    forge_index(folder, lambda metadata: None)
    assert verify(folder).facts["remark"] == ["mine"]
    assert load_checkpoint(folder, small_state())["schedule"] == {"num_steps": 2}
    assert open_tensors(folder)["body.bias"].load().tolist() == [2.0] * 4


@pytest.mark.parametrize(
    "name",
    ["/dev/zero", "../../etc/passwd", "../step-0000001/common.pt", "a/b", ".", "..", "a\nb", "",
     "manifest.json", "x" * 300, "\u00e9", "a\0b"],
)  # fmt: skip
def test_a_manifest_lists_only_names_of_files_in_its_folder(folder: Path, name: str) -> None:
    record = {"size": 0, "sha256": "0" * 64}
    forge_manifest(folder, lambda body: body["files"].update({name: record}))
    with pytest.raises(CheckpointError, match="not the name of a file in the checkpoint's folder"):
        verify(folder)
    assert find_checkpoint(folder.parent).step == 1


@pytest.mark.parametrize("field", ["step", "facts", "layout", "files", "versions", "created"])
def test_a_missing_field_is_named(folder: Path, field: str) -> None:
    forge_manifest(folder, lambda body: body.pop(field))
    with pytest.raises(CheckpointError, match=rf"manifest\.json lacks {field}"):
        read_manifest(folder)


def test_an_unknown_field_is_named(folder: Path) -> None:
    forge_manifest(folder, lambda body: body.update(owner="me", age=3))
    with pytest.raises(CheckpointError, match=r"does not know \(age, owner\)"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "2"}, 'step "2", but it must be a whole number'),
        ({"step": True}, "step true"),
        ({"step": -1}, "at least 0"),
        ({"step": 2.0}, "step 2.0"),
        ({"created": None}, "created null"),
        ({"layout": [1]}, r"layout \[1\], but it must be an object"),
        ({"layout": {"world": "1"}}, 'layout has world "1"'),
        ({"layout": {"world": 0}}, "layout has world 0"),
        ({"versions": {"torch": 2}}, "versions has torch 2"),
        ({"files": []}, r"files \[\], but it must be an object"),
        ({"files": {"a": 3}}, "files has a 3"),
        ({"files": {"a": {"size": 1}}}, "files: a lacks sha256"),
        ({"files": {"a": {"size": -1, "sha256": "0" * 64}}}, "size -1"),
        ({"files": {"a": {"size": 1, "sha256": "0" * 63}}}, "64 hexadecimal digits"),
        ({"files": {"a": {"size": 1, "sha256": "0" * 64, "x": 1}}}, "a size and a sha256"),
        ({"facts": None}, "facts null"),
    ],
)
def test_every_field_is_of_its_type(folder: Path, change: dict[str, Any], message: str) -> None:
    forge_manifest(folder, lambda body: body.update(change))
    with pytest.raises(CheckpointError, match=message):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", [1]), ("model", {"language": 3}), ("model", None),
        ("modules", "body"), ("modules", [1]), ("modules", None),
        ("has_added", 1), ("tokenizer", None), ("stage", ["a"]), ("recipe", []), ("step", "1"),
        ("progress", [1]), ("progress", {"step": "1"}), ("progress", {"step": True}),
        ("data_sets", {"a": 1}), ("data_sets", [None]), ("sources", ["a"]),
        ("sources", {"model": 1}), ("validation", 0.5), ("validation", {"step": 1}),
        ("validation", {"step": 1, "loss": "low"}), ("loader", [1]),
        ("loader", {"num_workers": "2"}),
        ("parent", "stage1"), ("parent", {"parent": {"parent": {"data_sets": "a"}}}),
    ],
)  # fmt: skip
def test_every_fact_that_is_read_is_of_its_type(folder: Path, name: str, value: Any) -> None:
    forge_manifest(folder, lambda body: body["facts"].update({name: value}))
    with pytest.raises(CheckpointError, match=r"facts(: parent)* has \w+ .*, but it must be"):
        read_manifest(folder)


def test_facts_that_a_run_writes(folder: Path) -> None:
    parent = {"path": "/a", "step": 3, "stage": None, "data_sets": None, "sources": None,
              "parent": None}  # fmt: skip
    facts = {"validation": {"step": 1, "loss": float("nan")}, "loader": None, "parent": parent}
    forge_manifest(folder, lambda body: body["facts"].update(facts))
    assert read_manifest(folder).facts["parent"] == parent


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_facts_that_are_nested_too_deep(folder: Path) -> None:
    forge_manifest(folder, lambda body: body["facts"].update(deep=nested(100)))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt", "manifest.json"])
@pytest.mark.parametrize("kind", ["a link", "a named pipe", "a folder", "a device"])
def test_only_plain_files_of_the_folder_are_read(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.rename(folder.parent / "elsewhere")
    if kind == "a link":
        path.symlink_to(folder.parent / "elsewhere")
    elif kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
        kind = "a link"
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: it is {kind}"):
        verify(folder)
    for sums in (True, False):
        assert find_checkpoint(folder.parent, verify=sums).step == 1


def place(metadata: Any, **fields: Any) -> None:
    """Give a tensor another place."""
    index = next(i for i in metadata.storage_data if i.fqn == "body.weight")
    for name, value in fields.items():
        setattr(metadata.storage_data[index], name, value)


def resize(metadata: Any, size: tuple[int, ...]) -> None:
    metadata.state_dict_metadata["body.weight"].size = torch.Size(size)


INDICES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "outside": (lambda m: place(m, relative_path="../step-0000001/__0_0.distcp"), "does not list"),
    "absolute": (lambda m: place(m, relative_path="/dev/zero"), "does not list"),
    "unlisted": (lambda m: place(m, relative_path="mine.distcp"), "does not list"),
    "no path": (lambda m: place(m, relative_path=3), "nowhere"),
    "behind the end": (lambda m: place(m, offset=10**9), "behind the end"),
    "before the beginning": (lambda m: place(m, offset=-1), "at -1"),
    "no length": (lambda m: place(m, length="1"), '"1" bytes long'),
    "transformed": (lambda m: place(m, transform_descriptors=["zstd"]), "transformation"),
    "no places": (lambda m: setattr(m, "storage_data", None), "no values and their places"),
    "no entries": (lambda m: setattr(m, "state_dict_metadata", [1]), "no values and their places"),
    "no place": (lambda m: m.storage_data.clear(), "without a place"),
    "no index": (lambda m: m.storage_data.update({"a": 1}), "without a key"),
    "no entry": (lambda m: m.state_dict_metadata.update(a=torch.Size([1])), "as a Size"),
    "huge": (lambda m: resize(m, (10**12, 3)), "files are too small"),
    "empty and huge": (lambda m: resize(m, (10**12, 0)), "files are too small"),
    "negative": (lambda m: resize(m, (-4, 3)), "without type or shape"),
    "smaller": (lambda m: resize(m, (2, 3)), "outside of its shape"),
    "flat": (lambda m: resize(m, (12,)), "outside of its shape"),
    "no class": (lambda m: {"a": 1}, "not a checkpoint's index but a dict"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_is_believed_only_where_it_can_be_right(folder: Path, kind: str) -> None:
    change, message = INDICES[kind]
    forge_index(folder, change)
    (folder / "mine.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    verify(folder)  # every sum is right
    for read in (open_tensors, lambda path: load_checkpoint(path, small_state())):
        with pytest.raises(CheckpointError, match=message):
            read(folder)


def test_an_index_without_its_fields(folder: Path) -> None:
    forge_index(folder, lambda m: delattr(m, "state_dict_metadata"))
    with pytest.raises(CheckpointError, match="not a checkpoint's index"):
        open_tensors(folder)


@pytest.mark.parametrize("name", ["common.pt", ".metadata", "metadata.json"])
def test_what_no_sum_covers_is_not_loaded(folder: Path, name: str) -> None:
    forge_manifest(folder, lambda body: body["files"].pop(name))
    with pytest.raises(CheckpointError, match=rf"does not list {name}"):
        load_checkpoint(folder, small_state())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.json", b"[" * 100_000),
        ("metadata.json", b'{"sharded_backend": 3}'),
        ("metadata.json", b'{"sharded_backend": "torch_dist", "a": 1}'),
        ("metadata.json", b'{"sharded_backend": "zarr"}'),
        ("common.pt", b"\x80\x02]q\x00."),
    ],
)
def test_small_files_of_another_kind(folder: Path, name: str, content: bytes) -> None:
    forge_file(folder, name, content)
    with pytest.raises(CheckpointError, match=rf"{name} (is|has)|no distributed checkpoint"):
        load_checkpoint(folder, small_state())


def test_a_small_file_is_read_only_as_the_manifest_lists_it(folder: Path) -> None:
    forge_file(folder, "rng-00000.pt", b"state")
    manifest = read_manifest(folder)
    assert read_listed(folder, manifest, "rng-00000.pt") == b"state"
    (folder / "rng-00001.pt").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"does not list rng-00001\.pt"):
        read_listed(folder, manifest, "rng-00001.pt")
    (folder / "rng-00000.pt").write_bytes(b"longer than it was")
    with pytest.raises(CheckpointError, match="18 bytes instead of 5"):
        read_listed(folder, manifest, "rng-00000.pt")


def test_random_states_of_somebody_else_run_no_code(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for data in (pickle.dumps(RunsCode(marker)), b"", b"\0" * 50, capture_rng()[:-30]):
        with pytest.raises(ValueError, match="no random states"):
            restore_rng(data)
    assert not marker.exists()


@pytest.mark.parametrize("state", [3, {}, {"python": None}, {"python": (3, torch.ones(2), None)}])
def test_random_states_of_other_types(tmp_path: Path, state: Any) -> None:
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="no random states"):
        restore_rng((tmp_path / "state.pt").read_bytes())

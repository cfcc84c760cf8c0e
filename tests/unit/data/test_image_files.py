"""Reading untrusted paths: below their root, and plain files."""

import json
import os
from pathlib import Path

import pytest

from megatron_dattn.data.image_files import read_image_file
from megatron_dattn.data.missing import missing_image
from megatron_dattn.data.rejection import Reason, SampleError


def test_reading_stays_below_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "sub" / "a.png").write_bytes(b"inside")
    assert read_image_file(str(root), "sub/a.png") == b"inside"
    assert read_image_file(str(root), "sub/../sub/a.png") == b"inside"
    outside = str(tmp_path / "secret.png")
    neighbour = str(tmp_path / "root-too" / "a.png")
    for path in ("../secret.png", "sub/../../secret.png", outside, neighbour, ".", "/"):
        with pytest.raises(SampleError, match="leaves its image root"):
            read_image_file(str(root), path)


@pytest.mark.parametrize(
    "path",
    ["\ud800", "../\ud800.png", "/\ud800", "a\0b", "../\0", "a/" * 2048, "../" + "a/" * 10**6],
)
def test_a_path_that_no_file_can_have_is_a_missing_image(tmp_path: Path, path: str) -> None:
    with pytest.raises(SampleError) as caught:
        read_image_file(str(tmp_path), path)
    assert caught.value.reason == Reason.MISSING_IMAGE
    assert missing_image({"image": path}, str(tmp_path)) == path


def test_a_name_that_is_no_text_is_read(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"d\xff.png")).write_bytes(b"image")
    name = json.loads(json.dumps(os.listdir(tmp_path)))[0]
    assert read_image_file(str(tmp_path), name) == b"image"


def test_absolute_paths_below_the_root_are_those_images(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.png").write_bytes(b"inside")
    (tmp_path / "link").symlink_to(root)
    inside = root / "sub" / "a.png"
    for folder, path in (
        (root, inside),
        (f"{root}/", inside),
        ("/", inside),
        ("/", str(inside)[1:]),
        (tmp_path / "link", inside),
        (root, tmp_path / "link" / "sub" / "a.png"),
        (root, root / "sub" / ".." / "sub" / "a.png"),
    ):
        assert read_image_file(str(folder), str(path)) == b"inside"


@pytest.mark.parametrize("path", ["data:image/png;base64,", "https://host/", "s3://bucket/"])
def test_addresses_are_refused_as_what_they_are(tmp_path: Path, path: str) -> None:
    with pytest.raises(SampleError, match="only files are read") as caught:
        read_image_file(str(tmp_path), path + "A" * 300_000)
    assert caught.value.reason == Reason.BAD_RECORD


def test_missing_and_odd_files_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for path in ("none.png", "pipe.png", "folder.png"):
        with pytest.raises(SampleError, match=path) as caught:
            read_image_file(str(tmp_path), path)
        assert caught.value.reason == Reason.MISSING_IMAGE

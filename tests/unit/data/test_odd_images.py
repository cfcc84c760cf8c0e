"""No file that stands where an image should takes a worker down, slows it or fills its memory."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_dattn.data import image_files
from megatron_dattn.data.image_decoding import decode_image
from megatron_dattn.data.image_files import read_image_file
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.rejection import Reason, SampleError
from tests.unit.data.builders import data_config, make_dataset, make_loader, record
from tests.unit.data.odd_images import odd_files, photo, write_odd_files
from tests.unit.data.test_image_decoding import encoded

ROOT = Path(__file__).resolve().parents[3]
MEBIBYTES = 100  # of resident memory; about 20 are taken


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, set[str]]]:
    folder = tmp_path_factory.mktemp("odd")
    return folder, write_odd_files(folder)


def read_apart(folder: Path, names: list[str], scratch: Path) -> dict[str, Any]:
    """What became of files in a process of its own, which may neither crash nor say anything."""
    (scratch / "names.json").write_text(json.dumps(names))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.unit.data.read_odd_images", folder),
            *(scratch / "names.json", scratch / "fates.json"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "default:::PIL", "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    result: dict[str, Any] = json.loads((scratch / "fates.json").read_text())
    return result


def test_every_odd_file_is_read_or_rejected_with_its_reason(
    odd: tuple[Path, dict[str, set[str]]], tmp_path: Path
) -> None:
    folder, expected = odd
    found = read_apart(folder, list(expected), tmp_path)
    fates = found["fates"]
    wrong = {name: fates[name] for name in expected if fates[name][0] not in expected[name]}
    assert not wrong
    assert all(message for fate, message in fates.values() if fate != "good")
    assert found["grown"] < MEBIBYTES * 1024


def test_random_damage_is_never_a_crash(tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "GIF"):
        data = np.frombuffer(encoded(photo(40, 30), format), np.uint8)
        for number in range(150):
            damaged = data.copy()
            places = rng.integers(0, len(data), rng.integers(1, 12))
            damaged[places] = rng.integers(0, 256, len(places))
            (folder / f"{number}.{format}").write_bytes(damaged.tobytes())
    names = sorted(path.name for path in folder.iterdir())
    fates = read_apart(folder, names, tmp_path)["fates"]
    kinds = {fate for fate, _ in fates.values()}
    assert (
        {"good", "broken_image"} <= kinds <= {"good", "broken_image", "huge_image", "empty_image"}
    )


def test_a_loader_trains_on_what_is_good_and_counts_the_rest(
    odd: tuple[Path, dict[str, set[str]]], processor: Path, tmp_path: Path
) -> None:
    folder, expected = odd
    records = [record("<image>?", "yes", name) for name in expected]
    dataset = make_dataset(tmp_path, records)
    dataset = type(dataset)(path=dataset.path, image_root=str(folder))
    config = data_config(processor, num_workers=1, max_skipped_fraction=1.0)
    loader = make_loader(config, [dataset], training=False)
    trained = sum(batch.num_samples for batch in loader)
    skipped = loader.counters().skipped
    assert trained + sum(skipped.values()) == len(records)
    certain = Counter(next(iter(fates)) for fates in expected.values() if len(fates) == 1)
    open_to_both = len(records) - sum(certain.values())
    assert trained - certain["good"] in range(open_to_both + 1)
    for reason in (Reason.MISSING_IMAGE, Reason.HUGE_IMAGE, Reason.EMPTY_IMAGE):
        assert skipped[str(reason)] == certain[str(reason)] > 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("empty.png", "an empty file; only JPEG, PNG, WEBP, GIF are read"),
        ("heic.jpg", "a HEIC image"),
        ("avif.jpg", "an AVIF image"),
        ("drawing.svg", "an SVG drawing"),
        ("page.jpg", "a web page"),
        ("deep.tif", "a TIFF image"),
        ("cut-19.bmp", "a BMP image"),
        ("script.eps", "not an image"),
        ("bomb-pixels.png", "too large: Image size"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(name: str, text: str) -> None:
    data = next(data for known, data, _ in odd_files() if known == name)
    with pytest.raises(SampleError, match=text):
        decode_image(data, max_pixels=40_000_000)


def test_colours_of_odd_files_are_right() -> None:
    """Within JPEG's and the palette's losses, and CMYK's, which Pillow converts without profile."""
    files = {name: data for name, data, _ in odd_files()}
    expected = np.asarray(photo(), np.int64)
    grey = np.asarray(photo().convert("L").convert("RGB"), np.int64)
    for name, colours, tolerance in (
        ("cmyk.jpg", expected, 5),
        ("alpha.png", expected, 0),
        ("moves.png", expected, 0),
        ("moves.webp", expected, 6),
        ("moves.gif", expected, 20),
        ("gif-named.jpg", expected, 20),
        ("grey.jpg", grey, 3),
        ("deep.png", grey, 0),
    ):
        decoded = np.asarray(decode_image(files[name], max_pixels=10**6), np.int64)
        assert np.abs(decoded - colours).mean() <= tolerance, name


def test_a_file_that_grows_or_vanishes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "_PART_BYTES", 16)
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", 4096)
    monkeypatch.setattr(image_files, "_MAX_PARTS", 4096 // 16 + 1)
    path = tmp_path / "image.png"
    data = encoded(Image.new("RGB", (8, 8)))
    path.write_bytes(data)
    assert read_image_file(str(tmp_path), "image.png") == data
    assert ImagePreprocessor(8).squares(data)[0].shape == (8, 8, 3)

    real = os.fstat

    def growing(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        with path.open("ab") as file:  # after its size was asked for
            file.write(bytes(5000))
        return status

    monkeypatch.setattr(image_files.os, "fstat", growing)
    with pytest.raises(SampleError, match="bytes") as caught:
        read_image_file(str(tmp_path), "image.png")
    assert caught.value.reason == Reason.HUGE_IMAGE
    monkeypatch.undo()
    path.unlink()
    with pytest.raises(SampleError, match="No such file") as caught:
        read_image_file(str(tmp_path), "image.png")
    assert caught.value.reason == Reason.MISSING_IMAGE

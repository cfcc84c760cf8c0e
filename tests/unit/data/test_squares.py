"""Samples of many images, of tiles and of frames go through the loader into packs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_dattn.data.config import DataConfig, DatasetConfig
from megatron_dattn.errors import CheckpointError, ConfigError
from tests.unit.data.builders import data_config, make_dataset, make_loader, record
from tests.unit.data.test_loader import assert_equal, take

PATCHES = 4  # of a square of 16 pixels


def colour(number: int) -> tuple[int, int, int]:
    return (3 * number, 255 - 3 * number, 7 * number % 256)


def reds(pixels: Any) -> list[int]:
    """Which pictures these are, in their order."""
    return [round(value / 3) for value in pixels[:, 0].float().mean((1, 2)).tolist()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(64):
        Image.new("RGB", (20, 20), colour(number)).save(folder / f"{number}.png")
    Image.new("RGB", (90, 20), colour(70)).save(folder / "wide.png")
    return folder


def shows(*numbers: int, **more: Any) -> dict[str, Any]:
    question = "<image>" * len(numbers) + " what ?"
    return {**record(question, "it", [f"{number}.png" for number in numbers]), **more}


def data_set(folder: Path, scratch: Path, records: list[dict[str, Any]]) -> DatasetConfig:
    dataset = make_dataset(scratch, records)
    return DatasetConfig(path=dataset.path, image_root=str(folder))


def test_none_to_sixty_four_images_share_a_pack(
    processor: Path, folder: Path, tmp_path: Path
) -> None:
    counts = [0, 1, 2, 5, 0, 8, 16, 32]  # 64 together
    records = [shows(*range(count)) for count in counts] + [shows(*range(64)), shows()]
    config = data_config(processor, visual_budget=64 * PATCHES)
    dataset = data_set(folder, tmp_path, records)
    first, second = make_loader(config, [dataset], training=False, micro_batch_size=8)
    assert first.num_samples == 8
    assert first.layout.visual_lengths == tuple(count * PATCHES for count in counts)
    assert reds(first.pixel_values) == [number for count in counts for number in range(count)]
    assert second.layout.visual_lengths == (64 * PATCHES, 0)
    assert reds(second.pixel_values) == list(range(64))


def test_a_limit_of_images_rejects_and_names_both_numbers(
    processor: Path, folder: Path, tmp_path: Path
) -> None:
    dataset = data_set(folder, tmp_path, [shows(*range(count)) for count in (3, 4, 5)])
    config = data_config(
        processor, visual_budget=64 * PATCHES, max_images_per_sample=4, max_skipped_fraction=1.0
    )
    loader = make_loader(config, [dataset], training=False)
    (batch,) = loader
    assert batch.layout.visual_lengths == (3 * PATCHES, 4 * PATCHES)
    assert loader.counters().skipped == {"too_many_images": 1}


def mixed(folder: Path, scratch: Path) -> DatasetConfig:
    """Tiles, frames of lists, and text, in turn."""
    frames = [f"{number}.png" for number in range(20)]
    kinds = [
        record("<image> what ?", "wide", "wide.png"),
        {**record("<video> what ?", "it moves"), "video": frames},
        record("what ?", "nothing"),
        shows(3, 4),
    ]
    return data_set(folder, scratch, kinds * 5)


def tiled(processor: Path, **changes: Any) -> DataConfig:
    pinpoints = [[16, 48], [16, 16]]
    settings = {"image_fit": "anyres", "image_grid_pinpoints": pinpoints, "video_frames": 3}
    return data_config(processor, **{"visual_budget": 10 * PATCHES, **settings, **changes})


def test_tiles_and_frames_are_packed_by_their_tokens(
    processor: Path, folder: Path, tmp_path: Path
) -> None:
    loader = make_loader(tiled(processor), [mixed(folder, tmp_path)], training=False)
    batches = list(loader)
    assert loader.counters().skipped == {}
    lengths = [length for batch in batches for length in batch.layout.visual_lengths]
    # Four squares of the wide image, three frames, none, two images of two squares each.
    assert sorted(lengths) == sorted([4 * PATCHES, 3 * PATCHES, 0, 4 * PATCHES] * 5)
    for batch in batches:
        assert len(batch.pixel_values) == len(batch.layout.images)
        assert sum(batch.layout.visual_lengths) <= 10 * PATCHES
    frames = [reds(batch.pixel_values) for batch in batches]
    assert [0, 9, 19] in [row[i : i + 3] for row in frames for i in range(len(row))]


def test_a_resumed_loader_goes_on_with_tiles_and_frames(
    processor: Path, folder: Path, tmp_path: Path
) -> None:
    dataset = mixed(folder, tmp_path)
    loader = make_loader(tiled(processor), [dataset])
    take(loader, 3)
    state = loader.save_state()
    expected = take(loader, 6)
    resumed = make_loader(tiled(processor), [dataset])
    resumed.restore_state(state)
    assert_equal(take(resumed, 6), expected)
    for change, name in (
        ({"image_fit": "pad", "image_grid_pinpoints": None}, "data.image_fit"),
        ({"image_grid_pinpoints": [[16, 48]]}, "data.image_fit"),
        ({"video_frames": 4}, "data.video_frames"),
        ({"max_images_per_sample": 9}, "data.max_images_per_sample"),
    ):
        with pytest.raises(CheckpointError, match=name):
            make_loader(tiled(processor, **change), [dataset]).restore_state(state)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"visual_budget": 3 * PATCHES},
            "than one image with the most tiles, which has 16",
        ),
        ({"image_grid_pinpoints": [[24, 16]]}, r"has \[24, 16\]"),
        ({"image_fit": "pad"}, "image_grid_pinpoints is for data.image_fit 'anyres'"),
        ({"max_images_per_sample": -1}, "must not be negative"),
        ({"video_frames": 0}, "video_frames must be positive"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    processor: Path, folder: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    dataset = data_set(folder, tmp_path, [shows(1)])
    with pytest.raises(ConfigError, match=text):
        make_loader(tiled(processor, **changes), [dataset])


def test_pixels_of_tiles_are_those_of_their_image(
    processor: Path, folder: Path, tmp_path: Path
) -> None:
    dataset = data_set(folder, tmp_path, [record("<image> what ?", "wide", "wide.png")])
    (batch,) = make_loader(tiled(processor), [dataset], training=False)
    base, *tiles = batch.pixel_values.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(base, np.full((16, 16, 3), colour(70)))
    # 90 x 20 becomes 48 x 11, with black above and below.
    for tile in tiles:
        assert np.array_equal(tile[2:13], np.full((11, 16, 3), colour(70)))
        assert not tile[:2].any()
        assert not tile[13:].any()

"""Parquet files as Hugging Face publishes data sets: columns, splits, nulls, and memory."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from megatron_dattn.data import parquet_rows
from megatron_dattn.data.conversation import parse_record
from megatron_dattn.data.image_files import RecordWithImages, images_of, read_image_file
from megatron_dattn.data.parquet_rows import ParquetRows, parquet_files
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.errors import DataError
from tests.unit.data.builders import record, save_image

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TURNS = record("<image>\nwhat ?", "a cat")["conversations"]
PNG = b"\x89PNG\r\n\x1a\n"


def write(path: Path, rows: list[dict[str, Any]], schema: Any = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, **options)
    return path


def image(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def read(path: Path) -> list[Any]:
    rows = ParquetRows(parquet_files(path))
    return [found for _, found in rows.rows(range(len(rows)))]


def test_llava_onevisions_columns(tmp_path: Path) -> None:
    rows = [
        {"id": "1.a", "image": image(PNG, "a.png"), "conversations": TURNS, "data_source": "x"},
        {"id": "2", "image": None, "conversations": TURNS, "data_source": "x"},
    ]
    first, second = read(write(tmp_path / "a.parquet", rows))
    assert first == {"id": "1.a", "image": ["0.png"], "conversations": TURNS}
    assert first.files == {"0.png": PNG}
    assert second == {"id": "2", "conversations": TURNS}
    assert not isinstance(second, RecordWithImages)


def test_the_cauldrons_columns(tmp_path: Path) -> None:
    texts = [
        {"user": "what ?", "assistant": "this", "source": "vqa"},
        {"user": "and ?", "assistant": "that", "source": "vqa"},
    ]
    jpeg = b"\xff\xd8\xff rest"
    row = {"images": [image(jpeg), image(PNG)], "texts": texts, "relevance_ratings": [1, 2]}
    (found,) = read(write(tmp_path / "a.parquet", [row]))
    conversation = parse_record(found)
    assert conversation.images == ("0.jpg", "1.png")
    assert [turn.text for turn in conversation.turns] == [
        "<image>\n<image>\nwhat ?",
        "this",
        "and ?",
        "that",
    ]
    assert found.files == {"0.jpg": jpeg, "1.png": PNG}


def test_chat_messages_columns(tmp_path: Path) -> None:
    """Parts of all kinds have all fields, most of them null."""
    parts = [
        {"type": "image", "text": None, "index": 0},
        {"type": "text", "text": "what ?", "index": None},
    ]
    answer = [{"type": "text", "text": "a cat", "index": None}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    row = {"images": [image(PNG)], "messages": messages}
    (found,) = read(write(tmp_path / "a.parquet", [row]))
    conversation = parse_record(found)
    assert [turn.text for turn in conversation.turns] == ["<image>\nwhat ?", "a cat"]
    assert conversation.images == ("0.png",)


def test_images_in_other_forms(tmp_path: Path) -> None:
    """Bytes alone, a path alone, and one of several that is not there."""
    save_image(tmp_path / "b.png", seed=1)
    bytes_alone = write(tmp_path / "1.parquet", [{"image": PNG, "conversations": TURNS}])
    assert read(bytes_alone)[0].files == {"0.png": PNG}
    path_alone = write(tmp_path / "2.parquet", [{"image": image(None, "b.png"), "messages": []}])
    (found,) = read(path_alone)
    assert found["image"] == ["./b.png"]
    data = read_image_file(images_of(found, str(tmp_path)), found["image"][0])
    assert data == (tmp_path / "b.png").read_bytes()
    rows = [
        {"images": [image(None, None), image(PNG)], "conversations": TURNS},
        {"images": [None], "conversations": TURNS},
        {"images": [], "conversations": TURNS},
    ]
    first, *others = read(write(tmp_path / "3.parquet", rows))
    assert first["image"] == ["./null", "1.png"]
    assert all("image" not in value for value in others)
    with pytest.raises(SampleError) as error:
        read_image_file(images_of(first, str(tmp_path)), "./null")
    assert error.value.reason == Reason.MISSING_IMAGE


def test_a_turn_that_is_null_is_the_loaders_to_judge(tmp_path: Path) -> None:
    rows = [{"texts": [{"user": "a", "assistant": None}]}, {"texts": None}]
    schema = pa.schema(
        [("texts", pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())])))]
    )
    for found in read(write(tmp_path / "a.parquet", rows, schema)):
        with pytest.raises(SampleError):
            parse_record(found)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a", "img": PNG}, "none of conversations, messages, texts"),
        ({"conversations": "a"}, "which is no list of turns"),
        ({"texts": [{"user": "a"}], "images": [3]}, "which is no image"),
    ],
)
def test_other_columns_are_one_error_that_lists_them(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words) as error:
        read(write(tmp_path / "a.parquet", [row]))
    assert all(f"{name}: " in str(error.value) for name in row)


def test_rows_are_found_by_their_numbers(tmp_path: Path) -> None:
    """Over files, row groups and batches."""
    for number in range(3):
        rows = [
            {"id": str(100 * number + n), "conversations": TURNS, "image": image(PNG + bytes([n]))}
            for n in range(100)
        ]
        write(tmp_path / f"train-{number:05d}-of-00003.parquet", rows, row_group_size=40)
    rows = ParquetRows(parquet_files(tmp_path))
    assert len(rows) == 300
    everything = [(number, found["id"]) for number, found in rows.rows(range(300))]
    assert everything == [(number, str(number)) for number in range(300)]
    some = [0, 31, 32, 39, 40, 99, 100, 215, 299]
    found = list(rows.rows(some))
    assert [(number, int(value["id"])) for number, value in found] == [(n, n) for n in some]
    assert [value.files["0.png"][-1] for _, value in found] == [n % 100 for n in some]


def test_a_folder_holds_one_split_and_all_of_it(tmp_path: Path) -> None:
    names = ["train-00000-of-00002", "train-00001-of-00002-bc495ea280060c3c", "test-00000-of-00001"]
    for name in names:
        write(tmp_path / f"{name}.parquet", [{"conversations": TURNS}])
    with pytest.raises(DataError, match="holds the splits test, train; name one of them in quot"):
        parquet_files(tmp_path)
    assert len(parquet_files(tmp_path / "train-*.parquet")) == 2
    (tmp_path / f"{names[0]}.parquet").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of the 2 files .*train-00000-of-00002.parquet"):
        parquet_files(tmp_path / "train-*.parquet")
    with pytest.raises(DataError, match="no file has the form"):
        parquet_files(tmp_path / "validation-*.parquet")


def test_a_damaged_file_is_one_error(tmp_path: Path) -> None:
    rows = [{"conversations": TURNS, "image": image(PNG + bytes(range(256)) * 40)}] * 200
    path = write(tmp_path / "a.parquet", rows, row_group_size=20, compression="zstd")
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read(path)
    path.write_bytes(good[:4] + bytes(2000) + good[2004:])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read(path)


def test_without_pyarrow_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", [{"conversations": TURNS}])
    monkeypatch.setattr(parquet_rows, "has_pyarrow", lambda: False)
    with pytest.raises(DataError, match="pip install pyarrow"):
        ParquetRows([path])


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Of 128 MB, some hundred kB of Python's and two row groups of pyarrow's are held at a time."""
    path = tmp_path / "large.parquet"
    data = bytes(2**18)
    schema = pa.schema([("image", pa.binary()), ("conversations", pa.list_(pa.string()))])
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(16):
            columns = {"image": [data] * 32, "conversations": [["x"]] * 32}
            writer.write_table(pa.table(columns, schema=schema), row_group_size=16)
    rows = ParquetRows([path])
    pool = pa.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    tracemalloc.start()
    for _, found in rows.rows(range(len(rows))):
        assert len(found.files["0.img"]) == len(data)
        most = max(most, pool.bytes_allocated() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * 2**20
    assert most < 32 * 2**20

"""Records of parquet files with the images' bytes in them, as Hugging Face publishes data sets.

    id, image: {bytes, path}, conversations: [{from, value}]          LLaVA-OneVision, LLaVA-NeXT
    images: [{bytes, path}], messages: [{role, content}]              TRL's and ChatML's
    images: [{bytes, path}], texts: [{user, assistant, source}]       the Cauldron, FineVision

Columns of other names are not read. A data set is one file or the files of one split in a folder
(`train-00000-of-00012.parquet`), and is read row group by row group, so that memory does not grow
with it. Whatever the text says, it is judged where records of JSON are.
"""

import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dattn.data.chat_messages import IMAGE_TOKEN
from megatron_dattn.data.image_files import RecordWithImages
from megatron_dattn.data.image_names import image_kind, outside_name
from megatron_dattn.errors import DataError

SUFFIX = ".parquet"

_TEXT_COLUMNS = ("conversations", "messages", "texts")
_IMAGE_COLUMNS = ("images", "image")
_OTHER_COLUMNS = ("id", "system")
_ROWS_AT_A_TIME = 32
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)(-[0-9a-f]+)?\.parquet")


def has_pyarrow() -> bool:
    """True if parquet files can be read: pyarrow is an optional package."""
    return importlib.util.find_spec("pyarrow") is not None


def parquet_files(path: Path) -> list[Path]:
    """Parquet files that a path stands for, in order: itself, a pattern's, a folder's.

    Raises:
        DataError: a pattern fits no file, or a folder has several splits or lacks files of its one.
    """
    if "*" in path.name:
        files = sorted(path.parent.glob(path.name))
        if not files:
            raise DataError(f"no file has the form '{path}'")
    elif path.is_dir():
        files = sorted(path.glob(f"*{SUFFIX}"))
    else:
        return [path] if path.suffix == SUFFIX else []
    _require_whole_split(path, files)
    return files


def _require_whole_split(path: Path, files: list[Path]) -> None:
    splits: dict[str, set[int]] = defaultdict(set)
    totals: dict[str, int] = {}
    for file in files:
        if match := _NUMBERED.fullmatch(file.name):
            splits[match[1]].add(int(match[2]))
            totals[match[1]] = int(match[3])
    if len(splits) > 1:
        raise DataError(
            f"'{path}' holds the splits {', '.join(splits)}; name one of them in quotes, such as "
            f"'{files[0].parent}/{next(iter(splits))}-*{SUFFIX}'"
        )
    for split, numbers in splits.items():
        if lacking := sorted(set(range(totals[split])) - numbers):
            raise DataError(
                f"'{path}' lacks {len(lacking)} of the {totals[split]} files of split {split}, "
                f"{split}-{lacking[0]:05d}-of-{totals[split]:05d}{SUFFIX} is the first; download "
                "them too"
            )


class ParquetRows:
    """The rows of some parquet files of one form, one behind the other."""

    def __init__(self, files: list[Path]) -> None:
        """Read the files' ends, which say how many rows and which columns they have.

        Raises:
            DataError: pyarrow is not installed, a file cannot be read, or the columns are others.
        """
        if not has_pyarrow():
            raise DataError(
                f"'{files[0]}' is a parquet file, which pyarrow reads; it is not installed: "
                "pip install pyarrow"
            )
        self._files = files
        self._counts = []
        self._columns: list[str] = []
        for file in files:
            opened = _open(file)
            self._columns = _columns(file, opened.schema_arrow)
            self._counts.append(opened.metadata.num_rows)

    def __len__(self) -> int:
        return sum(self._counts)

    def rows(self, numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """Records with their numbers, which ascend.

        Raises:
            DataError: a file is damaged.
        """
        wanted = np.fromiter(numbers, np.int64)
        start = 0
        for file, count in zip(self._files, self._counts, strict=True):
            here = _between(wanted, start, start + count)
            if len(here):
                for place, row in self._rows_of_file(file, here):
                    yield start + place, _record(row)
            start += count

    def _rows_of_file(self, file: Path, wanted: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        import pyarrow as pa

        opened, start = _open(file), 0
        try:
            for group in range(opened.num_row_groups):
                end = start + opened.metadata.row_group(group).num_rows
                here = _between(wanted, start, end)
                if len(here):
                    for place, row in self._rows_of_group(opened, group, here):
                        yield start + place, row
                start = end
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"'{file}' cannot be read as parquet: {error}") from error

    def _rows_of_group(
        self, opened: Any, group: int, wanted: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        start = 0
        for batch in opened.iter_batches(
            batch_size=_ROWS_AT_A_TIME, row_groups=[group], columns=self._columns, use_threads=False
        ):
            places = _between(wanted, start, start + batch.num_rows).tolist()
            rows = batch.take(places).to_pylist() if places else []
            for place, row in zip(places, rows, strict=True):
                yield start + place, row
            start += batch.num_rows


def _between(numbers: np.ndarray, start: int, end: int) -> np.ndarray:
    """Those of some ascending numbers from `start` to before `end`, counted from `start`."""
    first, last = np.searchsorted(numbers, (start, end))
    return numbers[first:last] - start


def _open(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"'{file}' cannot be read as parquet: {error}") from error


def _columns(file: Path, schema: Any) -> list[str]:
    """The columns to read."""
    names = set(schema.names)
    text = next((name for name in _TEXT_COLUMNS if name in names), None)
    image = next((name for name in _IMAGE_COLUMNS if name in names), None)
    reason = None
    if text is None:
        reason = f"none of {', '.join(_TEXT_COLUMNS)}"
    elif not _is_list(schema.field(text).type):
        reason = f"'{text}', which is no list of turns"
    elif image is not None and not _is_image(schema.field(image).type):
        reason = f"'{image}', which is no image ({{bytes, path}}) or list of them"
    if reason is not None:
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise DataError(
            f"'{file}' has {reason}; records need a list of turns, and images as 'image' or "
            f"'images'. Its columns are {found}"
        )
    return [name for name in (text, image, *_OTHER_COLUMNS) if name in names and name is not None]


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_image(kind: Any) -> bool:
    import pyarrow as pa

    if _is_list(kind):
        return _is_image(kind.value_type)
    if pa.types.is_struct(kind):
        return bool({"bytes", "path"} & {field.name for field in kind})
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_null)
    return any(test(kind) for test in tests)


def _record(row: dict[str, Any]) -> Any:
    """A row in LLaVA's form, or that of chat messages, with the images that it holds."""
    images: Any = next((row.pop(name) for name in _IMAGE_COLUMNS if name in row), None)
    names, files = _images(images if isinstance(images, list) else [images])
    if (texts := row.pop("texts", None)) is not None:
        row["conversations"] = _turns(texts, len(names))
    record = {key: value for key, value in row.items() if value is not None}
    if names:
        record["image"] = names
    return RecordWithImages(record, files) if files else record


def _images(images: list[Any]) -> tuple[list[str], dict[str, bytes]]:
    """The names of a row's images, and the bytes of those that are in it."""
    names: list[str | None] = []
    files: dict[str, bytes] = {}
    for number, image in enumerate(images):
        data, path = image, None
        if isinstance(image, dict):
            data, path = image.get("bytes"), image.get("path")
        if isinstance(data, bytes):
            names.append(f"{number}.{image_kind(data)}")
            files[f"{number}.{image_kind(data)}"] = data
        else:
            path = data if isinstance(data, str) else path
            names.append(None if path is None else outside_name(path))
    if all(name is None for name in names):
        return [], {}
    # One of several that is not there keeps its place.
    return [outside_name("null") if name is None else name for name in names], files


def _turns(texts: list[Any], num_images: int) -> list[dict[str, Any]]:
    """The Cauldron's exchanges, which all images precede, as LLaVA's turns."""
    turns = []
    for text in texts:
        exchange = text if isinstance(text, dict) else {}
        turns.append({"from": "human", "value": exchange.get("user")})
        turns.append({"from": "gpt", "value": exchange.get("assistant")})
    questions = [turn["value"] for turn in turns[::2]]
    if turns and not any(isinstance(q, str) and IMAGE_TOKEN in q for q in questions):
        first = questions[0]
        if isinstance(first, str):
            turns[0]["value"] = f"{IMAGE_TOKEN}\n" * num_images + first
    return turns

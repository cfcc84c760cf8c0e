"""Writing records as JSON lines with Energon's index: images stay where they are.

Images that come with their records (of parquet files and shards) are written into a folder of their
own, byte for byte.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_dattn.data.image_names import with_own_names
from megatron_dattn.data.json_lines import INDEX_SUFFIX, OFFSET, as_line
from megatron_dattn.errors import DataError
from megatron_dattn.runtime.os_errors import named

_RECORDS_PER_FOLDER = 1000


def write_jsonl(records: Iterable[Any], path: Path) -> int:
    """Write records as JSON lines with the index beside them; returns their number.

    The index is Energon's: the byte offset of every line and the size of the file, as 64-bit
    integers. Both files appear complete or not at all.

    Raises:
        DataError: one of the files exists already.
    """
    index_path = Path(f"{path}{INDEX_SUFFIX}")
    for existing in (path, index_path):
        if existing.exists():
            raise DataError(f"'{existing}' exists already; remove it or choose another folder")
    lines_part, index_part = Path(f"{path}.part"), Path(f"{index_path}.part")
    written = 0
    try:
        with named(path), lines_part.open("wb") as lines, index_part.open("wb") as index:
            for record in records:
                index.write(OFFSET.pack(lines.tell()))
                lines.write(as_line(record))
                written += 1
            index.write(OFFSET.pack(lines.tell()))
        lines_part.rename(path)
        index_part.rename(index_path)
    finally:
        lines_part.unlink(missing_ok=True)
        index_part.unlink(missing_ok=True)
    return written


def with_written_images(
    records: Iterable[tuple[int, Any]], image_root: Path, folder: Path
) -> Iterator[tuple[int, Any]]:
    """Numbered records whose images are files below `folder`, which are written here."""
    for number, record in records:
        beginning = f"{number // _RECORDS_PER_FOLDER:06d}/{number:09d}-"
        renamed, files, _ = with_own_names(record, str(image_root), beginning.__add__)
        for name, data in files.items():
            path = folder / name
            part = Path(f"{path}.part")
            with named(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                part.write_bytes(data)
                part.rename(path)
        yield number, renamed

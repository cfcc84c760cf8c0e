"""Names for images that travel with their records: by their number and the kind of their bytes.

A record's first image is `0.jpg`, the next `1.png`; one that is not there keeps the path by which
it was asked for, in a form that no such name has. So one is never taken for another.
"""

from collections.abc import Callable
from typing import Any

from megatron_dattn.data.chat_messages import as_llava
from megatron_dattn.data.conversation import image_paths
from megatron_dattn.data.image_files import images_of, read_image_file
from megatron_dattn.data.rejection import SampleError

_FILE_KEYS = ("image", "images", "video", "videos")
_STARTS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"GIF8", "gif"))


def image_kind(data: bytes) -> str:
    """The ending for a file with these bytes; `img` where they are of no kind that is decoded."""
    for start, kind in _STARTS:
        if data.startswith(start):
            return kind
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else "img"


def outside_name(path: str) -> str:
    """A path in a form that no image in a record has: with a folder."""
    return path if "/" in path else f"./{path}"


def with_own_names(
    record: Any, image_root: str, name: Callable[[str], str] = lambda short: short
) -> tuple[Any, dict[str, bytes], int]:
    """A record that calls its images by their numbers, and their files as they are.

    Args:
        name: the name to use in the place of `0.jpg`.

    Returns:
        The record in LLaVA's form, or as it is where it names no images or is wrong in a way that
        the loader counts; the files by name; how many images are not there.
    """
    try:
        paths = image_paths(record) if isinstance(record, dict) else ()
    except SampleError:
        paths = ()
    if not paths:
        return record, {}, 0
    images = images_of(record, image_root)
    names: dict[str, str] = {}
    files: dict[str, bytes] = {}
    for path in paths:
        if path in names:
            continue
        try:
            data = read_image_file(images, path)
        except SampleError:
            names[path] = outside_name(path)
        else:
            names[path] = name(f"{len(files)}.{image_kind(data)}")
            files[names[path]] = data
    renamed = {
        key: _renamed(value, names) if key in _FILE_KEYS else value
        for key, value in as_llava(record).items()
    }
    return renamed, files, len(names) - len(files)


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """A name, or names in lists as they stand there: of images, videos, a video's frames."""
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value

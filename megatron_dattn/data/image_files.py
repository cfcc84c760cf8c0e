"""Finding and reading the files of images that nobody has checked: below their root, and plain.

What is wrong with a file rejects its sample; what is wrong with the system that should read it
does not (system_errors.py).
"""

import os
import re
import stat

from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.system_errors import patiently
from megatron_dattn.errors import UserError, quoted

MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_PATH_BYTES = 4096  # Linux's
_ADDRESS = re.compile(r"(data|https?|ftp|file|s3|gs|hdfs):", re.IGNORECASE)


def locate_image(root: str, path: str) -> str:
    """The place of an image below `root`, whether it is there or not.

    The path may be absolute, but may not leave the root; links that the owner put below it are
    followed.

    Raises:
        SampleError: the path is outside the root, or is no path.
    """
    if _ADDRESS.match(path):
        kind = "a data URI" if path[:5].lower() == "data:" else "an address"
        raise SampleError(Reason.BAD_RECORD, f"image {quoted(path)} is {kind}; only files are read")
    if not _can_be_a_path(path):
        raise SampleError(
            Reason.MISSING_IMAGE, f"image path {quoted(path)} is none that a file has"
        )
    root = os.path.abspath(root)
    place = os.path.normpath(os.path.join(root, path))
    if not _is_below(place, root):
        raise SampleError(
            Reason.MISSING_IMAGE, f"image path {quoted(path)} leaves its image root {quoted(root)}"
        )
    return place


def _can_be_a_path(path: str) -> bool:
    """Whether the system could be asked for it, which else fails in many ways and places."""
    try:
        return b"\0" not in (name := os.fsencode(path)) and len(name) < MAX_PATH_BYTES
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON may spell it
        return False


def _is_below(place: str, root: str) -> bool:
    """By name; or else by what the names stand for, as one of them may go through a link."""
    for name in (str, os.path.realpath):
        folder = name(root)
        if name(place).startswith(folder if folder.endswith(os.sep) else folder + os.sep):
            return True
    return False


def read_image_file(root: str, path: str) -> bytes:
    """The bytes of an image below `root`.

    Raises:
        SampleError: the file is missing, outside the root, too large, or not a regular file.
        DataError: the system does not read it, however often it is asked, or memory ran out.
    """
    place = locate_image(root, path)
    name = f"image {quoted(path)} below {quoted(root)}"
    try:
        return patiently(name, lambda: _read(place, path))
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: characters that no file name has
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise SampleError(Reason.MISSING_IMAGE, f"{name}: {why}") from error


def image_is_there(root: str, path: str) -> bool:
    """True if a path names a regular file below `root`.

    Raises:
        SampleError: the path is outside the root, or is no path.
        DataError: the system does not say, however often it is asked.
    """
    place = locate_image(root, path)
    try:
        status = patiently(f"image {quoted(path)} below {quoted(root)}", lambda: os.stat(place))
    except UserError:
        raise
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(status.st_mode)


def _read(place: str, path: str) -> bytes:
    # Without O_NONBLOCK, a named pipe would be waited for.
    descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SampleError(Reason.MISSING_IMAGE, f"image {quoted(path)} is not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise SampleError(
                Reason.BROKEN_IMAGE, f"image {quoted(path)} has {status.st_size} bytes"
            )
        return file.read()

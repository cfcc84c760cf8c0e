"""Frames of a video: some of a list of image files, or some of a file's, by PyAV.

Frames are taken evenly, the first and the last among them. A file is never read into memory: its
packets are looked through once for their times, and then the decoder goes from the last key frame
before each wanted one. PyAV (FFmpeg) is optional; video files are untrusted input, so containers
and codecs are limited to the usual ones, nothing else is opened for them, and sizes are refused
before they are decoded.
"""

import importlib.util
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from megatron_dattn.data.image_decoding import require_size
from megatron_dattn.data.image_files import ImageRoot, opened_file, place_name
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.system_errors import patiently
from megatron_dattn.errors import ConfigError, UserError, quoted

MAX_PACKETS = 1_000_000
"""Of a video: nine hours at 30 frames a second."""
_CONTAINERS = "mov,mp4,matroska,webm,avi"
_CODECS = ("h264", "hevc", "vp8", "vp9", "libdav1d", "av1", "mpeg4", "mjpeg")
_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}
Read = TypeVar("Read")


@dataclass(frozen=True)
class Video:
    """A video of a record, which stands for its frames."""

    paths: tuple[str, ...]
    """The images of its frames, in order, or one video file."""
    is_file: bool


def has_av() -> bool:
    """True if PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def evenly(total: int, count: int) -> list[int]:
    """The numbers of at most `count` of `total` frames, the first and the last among them."""
    if total <= count:
        return list(range(total))
    return [number * (total - 1) // max(count - 1, 1) for number in range(count)]


def num_frames(root: ImageRoot, path: str, count: int, *, max_pixels: int) -> int:
    """Number of frames that `read_frames` returns; nothing is decoded. Raises as it does."""
    return _read(root, path, max_pixels, lambda video: len(evenly(len(video.times), count)))


def read_frames(
    root: ImageRoot, path: str, count: int, make: Callable[[Image.Image], Read], *, max_pixels: int
) -> list[Read]:
    """Make something of at most `count` frames of a video file below `root`.

    Args:
        make: is given a frame, upright and in RGB; no two frames are kept at a time.

    Raises:
        SampleError: the file is missing, damaged, of another kind, without frames, or too large.
        DataError: the system does not read it.
        ConfigError: PyAV is not installed.
    """
    return _read(
        root,
        path,
        max_pixels,
        lambda video: [make(video.frame(number)) for number in evenly(len(video.times), count)],
    )


def _read(
    root: ImageRoot, path: str, max_pixels: int, read: Callable[["_OpenVideo"], Read]
) -> Read:
    if not has_av():
        raise ConfigError(
            f"video {quoted(path)}: reading video files needs PyAV, which is not installed; "
            "pip install 'megatron_dattn[video]', or give a list of frames"
        )
    name = f"video {place_name(root, path)}"

    def attempt() -> Read:
        with _opened(root, path, max_pixels) as video:
            return read(video)

    try:
        return patiently(name, attempt)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise SampleError(Reason.MISSING_IMAGE, f"{name}: {why}") from error


@contextmanager
def _opened(root: ImageRoot, path: str, max_pixels: int) -> Iterator["_OpenVideo"]:
    import av

    # Of a file that was given as an object FFmpeg opens no other by itself; this says so.
    options = {
        "format_whitelist": _CONTAINERS,
        "codec_whitelist": ",".join(_CODECS),
        "protocol_whitelist": "none",
        "max_pixels": _allocation(max_pixels),
    }
    with opened_file(root, path) as file:
        try:
            with av.open(file, options=options) as container:
                yield _OpenVideo(container, max_pixels)
        except av.FFmpegError as error:
            # Out of memory too: a damaged file asks FFmpeg for any amount.
            why = error.strerror
        except (UserError, MemoryError, OSError):
            raise
        except Exception as error:
            # As of Pillow's decoders: damaged bytes are the sample's fault, whatever they raise.
            why = f"{type(error).__name__}: {error}"
        else:
            return
    raise _broken(f"the video is damaged, or of another kind: {why}")


class _OpenVideo:
    """An open container's first video stream.

    Args:
        container: PyAV's, at its beginning.
        max_pixels: of a frame.

    Raises:
        SampleError: there is no such stream, no frame, or it is cut off.
    """

    def __init__(self, container: Any, max_pixels: int) -> None:
        if not container.streams.video:
            raise _broken("the file has no video stream")
        self._container = container
        self._stream = container.streams.video[0]
        codec = self._stream.codec_context
        if codec is None or codec.codec.name not in _CODECS:
            raise _broken(f"the video's codec is none of {', '.join(_CODECS)}")
        self._max_pixels = max_pixels
        self._check_size(codec)
        codec.thread_count = 1  # every thread of a decoder keeps frames of its own
        codec.options = {"max_pixels": _allocation(max_pixels)}
        self._find_times()
        self._decoder: Iterator[Any] = iter(())
        self._at: int | None = None  # time of the frame that was decoded last

    def _check_size(self, frame: Any) -> None:
        try:
            require_size((frame.width, frame.height), self._max_pixels)
        except SampleError as error:
            raise _broken(str(error)) from error

    def _find_times(self) -> None:
        times: list[int] = []
        keys: list[int] = []
        for packet in self._container.demux(self._stream):
            time = packet.dts if packet.pts is None else packet.pts
            if packet.size == 0 or time is None or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise _broken("a packet of the video is damaged")
            times.append(time)
            if packet.is_keyframe:
                keys.append(time)
            if len(times) > MAX_PACKETS:
                raise _broken(f"the video has more than {MAX_PACKETS} frames")
        if not times:
            raise _broken("the video has no frames")
        if len(times) < self._stream.frames:  # known from an index, where there is one
            raise _broken(f"the video ends after {len(times)} of {self._stream.frames} frames")
        self.times, self._keys = sorted(set(times)), sorted(keys)

    def frame(self, number: int) -> Image.Image:
        """One of its frames by its place in `times`; cheapest in their order."""
        time = self.times[number]
        if self._at is None or time <= self._at or self._key_before(time) > self._at:
            self._seek(time)
        frame = self._next_at(time)
        if frame is None or frame.is_corrupt or frame.pts > time:
            # Where a container has no index, or a stream no clean start there, from its beginning.
            self._seek(self.times[0])
            frame = self._next_at(time)
        if frame is None or frame.is_corrupt:
            raise _broken(f"frame {number} of {len(self.times)} cannot be decoded")
        self._check_size(frame)
        return upright(frame.to_image(), frame.rotation)

    def _key_before(self, time: int) -> int:
        place = bisect_right(self._keys, time)
        return self._keys[place - 1] if place else self.times[0]

    def _seek(self, time: int) -> None:
        self._container.seek(time, stream=self._stream)
        self._decoder = self._container.decode(self._stream)

    def _next_at(self, time: int) -> Any:
        """The first of the frames to come that stands at a time or behind it; None at the end."""
        for frame in self._decoder:
            self._at = frame.pts
            if frame.pts is not None and frame.pts >= time:
                return frame
        return None


def upright(image: Image.Image, rotation: int) -> Image.Image:
    """An image turned as the container says, by so many degrees to the left."""
    turn = _TURNS.get(rotation % 360)
    return image if turn is None else image.transpose(turn)


def _allocation(max_pixels: int) -> str:
    """What FFmpeg may allocate for a frame, which it gives edges; sizes are judged here."""
    return str(2 * max_pixels + 2**20)


def _broken(why: str) -> SampleError:
    return SampleError(Reason.BROKEN_VIDEO, why)

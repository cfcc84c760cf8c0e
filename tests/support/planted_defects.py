"""A data set in which every defect that a check must find is planted, and the list of what was.

Most records are sound. Each defect stands in as many records as asked for, spread over the whole
file by a seed; what must become of each record under the settings that go with the set
(`POLICIES`) is noted.
"""

import io
import json
import random
import struct
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_dattn.data.policies import Policy
from megatron_dattn.data.videos import has_av

Json = dict[str, Any]

SIDE = 64  # of sound images, in pixels
MAX_PIXELS = 10_000
WORDS = ("what is in the picture", "a red square", "on a green field", "left of the blue circle")

POLICIES: dict[str, Policy] = {
    "odd_roles": "fix",
    "no_answer": "fix",
    "empty_answer": "fix",
    "image_count": "fix",
    "extra_placeholder": "skip",
    "cmyk_image": "skip",
}
"""Some are fixed and others skipped, against the defaults too."""


@dataclass
class Planted:
    """What was planted."""

    records: list[Json]
    found: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    """The problems of each record that has any."""
    fixed: Counter[str] = field(default_factory=Counter)
    """Records by problem that is fixed, all of which are used."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Records by problem for which they are not used."""
    unused: set[int] = field(default_factory=set)
    repeated: set[int] = field(default_factory=set)
    """Records whose content stands further ahead, too."""
    repeated_ids: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Defect:
    """One way of going wrong."""

    problem: str
    spoil: Callable[["Maker", Json], None]
    """Changes a sound record with one image and one exchange."""
    is_fixed: bool = False


class Maker:
    """Writes images and records below a folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self._pixels = np.random.default_rng(seed)
        # Encoding is the slowest part: files share a few contents, each under a name of its own.
        self._contents = [encoded(self._noise(), "JPEG") for _ in range(64)]
        self._written = 0

    def image(self, data: bytes | None = None, suffix: str = "jpg") -> str:
        """The path of a new image, a sound one where no bytes are given."""
        path = f"images/{self._written // 1000:04d}/{self._written:07d}.{suffix}"
        self._written += 1
        place = self.folder / path
        if self._written % 1000 == 1:
            place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(self.random.choice(self._contents) if data is None else data)
        return path

    def record(self, number: int) -> Json:
        words = " ".join(self.random.choices(WORDS, k=self.random.randint(1, 4)))
        turns = [
            {"from": "human", "value": f"<image>\n{words}"},
            {"from": "gpt", "value": f"{words} {number}"},
        ]
        return {"id": f"r{number}", "image": self.image(), "conversations": turns}

    def _noise(self) -> Image.Image:
        small = self._pixels.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, row: bytes) -> bytes:
    """A PNG of equal rows, of a kind that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress((b"\0" + row) * height)
    parts = ((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _frames(kind: str) -> bytes:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    return encoded(first, kind, save_all=True, append_images=[second])


def _image(data: bytes, suffix: str = "jpg") -> Callable[[Maker, Json], None]:
    return lambda maker, record: record.update(image=maker.image(data, suffix))


def _with(**fields: Any) -> Callable[[Maker, Json], None]:
    return lambda maker, record: record.update(json.loads(json.dumps(fields)))


def _turns(change: Callable[[list[Json]], Any]) -> Callable[[Maker, Json], None]:
    def spoil(maker: Maker, record: Json) -> None:
        change(record["conversations"])

    return spoil


def _turn(role: str, text: str) -> Json:
    return {"from": role, "value": text}


def _asking(text: str) -> Callable[[Maker, Json], None]:
    return _turns(lambda turns: turns[0].update(value=text))


def _answering(text: str) -> Callable[[Maker, Json], None]:
    return _turns(lambda turns: turns[1].update(value=text))


def _five_images(maker: Maker, record: Json) -> None:
    record["image"] = [record["image"]] * 5
    record["conversations"][0]["value"] = "<image>" * 5


def _no_video(maker: Maker, record: Json) -> None:
    record.update(image=None, video=maker.image(b"no video at all", "mp4"))


def text_defects() -> list[Defect]:
    """Those of a record, several of some problems."""
    later_human, later_gpt = _turn("human", "why ?"), _turn("gpt", "")
    return [
        Defect("bad_record", _with(conversations="none")),
        Defect("bad_record", _with(video=3)),
        Defect("bad_record", _with(image="https://example.org/cat.jpg")),
        Defect("bad_record", _asking("half \ud83d")),
        Defect("odd_roles", _turns(lambda turns: turns[0].update({"from": "tool"}))),
        Defect("odd_roles", _turns(lambda turns: turns.insert(1, _turn("human", "twice")))),
        Defect("odd_roles", _turns(lambda turns: turns[1].update({"from": "Assistant"})), True),
        Defect("leading_answer", _turns(lambda turns: turns.insert(0, _turn("gpt", "hi"))), True),
        Defect("no_answer", _turns(lambda turns: turns.pop())),
        Defect("no_answer", _turns(lambda turns: turns.append(later_human)), True),
        Defect("empty_answer", _answering(" ")),
        Defect("empty_answer", _turns(lambda turns: turns.extend([later_human, later_gpt])), True),
        Defect("image_count", _asking("no image"), True),
        Defect("image_count", _with(video="film.mp4")),
        Defect("image_count", lambda maker, record: record.update(image=[record["image"]] * 2)),
        Defect("extra_placeholder", _asking("<image><image>")),
        Defect("extra_placeholder", _with(image=None)),
        Defect("control_token", _asking("<image> [INST]")),
        Defect("control_token", _answering("see <image>")),
        Defect("too_much_text", _answering("a red " * 500)),
        Defect("too_many_images", _five_images),
    ]


def image_defects() -> list[Defect]:
    """Those of a file of an image or video, where there is what decodes it."""
    square = Image.new("RGB", (SIDE, SIDE), "green")
    jpeg = encoded(square, "JPEG")
    videos = [Defect("broken_video", _no_video)] if has_av() else []
    return [
        *videos,
        Defect("missing_image", _with(image="images/none.jpg")),
        Defect("missing_image", _with(image="../outside.jpg")),
        Defect("empty_image", _image(b"")),
        Defect("empty_image", _image(png(0, 4, 8, 2, b""), "png")),
        Defect("broken_image", _image(jpeg[: len(jpeg) // 2])),
        Defect("broken_image", _image(b"no image at all")),
        Defect("broken_image", _image(encoded(square, "BMP"))),
        Defect("huge_image", _image(encoded(square.resize((200, 100)), "PNG"), "png")),
        Defect("animated_image", _image(_frames("GIF"), "gif"), True),
        Defect("animated_image", _image(_frames("PNG"), "png"), True),
        Defect("animated_image", _image(_frames("WEBP"), "webp"), True),
        Defect("cmyk_image", _image(encoded(square.convert("CMYK"), "JPEG"))),
        Defect("sixteen_bit_image", _image(png(4, 4, 16, 2, bytes(24)), "png"), True),
        Defect("sixteen_bit_image", _image(png(4, 4, 16, 0, bytes(8)), "png"), True),
    ]


def plant(folder: Path, count: int, *, each: int = 2, seed: int = 0) -> Planted:
    """Make a set of records whose images lie below `folder`.

    Args:
        count: of all records.
        each: records for each way of going wrong, for repeated records and for repeated ids.
    """
    maker = Maker(folder, seed)
    spoiled = [each_way for each_way in (*text_defects(), *image_defects()) for _ in range(each)]
    assert count >= 2 * (len(spoiled) + 2 * each), "most records are to be sound"
    places = maker.random.sample(range(count // 2, count), len(spoiled) + 2 * each)
    planted = Planted([maker.record(number) for number in range(count)])
    for number, defect in zip(places, spoiled, strict=False):
        defect.spoil(maker, planted.records[number])
        planted.found[number].add(defect.problem)
        (planted.fixed if defect.is_fixed else planted.skipped)[defect.problem] += 1
        if not defect.is_fixed:
            planted.unused.add(number)
    # Of sound records in the first half, so that what is repeated is sound too.
    for number in places[len(spoiled) : len(spoiled) + each]:
        first = planted.records[maker.random.randrange(count // 2)]
        planted.records[number] = {**first, "id": f"r{number}"}
        planted.repeated.add(number)
    for number in places[len(spoiled) + each :]:
        planted.records[number]["id"] = f"r{maker.random.randrange(count // 2)}"
        planted.repeated_ids.add(number)
    return planted


def lines(records: list[Json]) -> Iterator[str]:
    """The records as lines of a .jsonl file."""
    for record in records:
        yield json.dumps(record) + "\n"

"""The page shows what was found, and nothing in the data becomes a part of it."""

import base64
import io
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_dattn.data import check_html
from megatron_dattn.data.check import RecordChecker, check_records, records_of
from megatron_dattn.data.check_html import THUMBNAIL_SIDE, histogram, page
from megatron_dattn.data.check_report import Finding, RecordCheck, Report
from megatron_dattn.data.problems import DUPLICATE_RECORD
from megatron_dattn.data.rejection import Reason
from tests.unit.data.builders import make_shards, record, save_image

ELEMENTS = set(
    re.findall(
        r"\w+",
        "html head meta title style body h1 h2 h3 p table tr th td ul li img svg rect line text",
    )
)
MARKUP = "<script>alert('\"&')</script>\ud800"


class Reader(HTMLParser):
    """Collects the elements and the text of a page, and sees that all are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.pictures: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag == "img":
            self.pictures.append(dict(attrs)["src"] or "")
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def report(tmp_path: Path) -> Report:
    Image.effect_noise((300, 100), 90).save(tmp_path / "wide.png")
    (tmp_path / "cut.png").write_bytes(b"no image")
    report = Report(f"{MARKUP}.json", tmp_path, text_budget=64, visual_budget=16)
    for image in ("wide.png", "cut.png", f"{MARKUP}.png"):
        found = Finding(Reason.BROKEN_IMAGE, f"image {image} of {MARKUP}", image=image)
        report.add(RecordCheck("skipped", (found,), 1, 12, 4, None, MARKUP, 1))
    report.add_duplicates(DUPLICATE_RECORD, [(2, 1)])
    return report


def test_the_page_is_complete_and_has_no_element_of_the_data(report: Report) -> None:
    text = page([report, report], max_pixels=10**6)
    text.encode()
    read = Reader(text)
    assert set(read.tags) <= ELEMENTS
    assert "script" not in read.tags
    assert read.tags["svg"] == 4
    assert "<script>alert" in read.text  # as text
    assert "broken_image: 3" in read.text
    assert "record 2: as record 1" in read.text
    assert "Training would use 0 of them (0 after a fix), skip 3 and stop at 0." in read.text
    assert not re.findall(r"(?:src|href)=\"(?!data:image/png;base64,)", text)


def test_thumbnails_are_small_pictures_of_what_can_be_decoded(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = Reader(page([report], max_pixels=10**6)).pictures
    image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert image.size == (THUMBNAIL_SIDE, 21)
    assert Reader(page([report], max_pixels=100)).pictures == []
    assert len(Reader(page([report] * 3, max_pixels=10**6)).pictures) == 3
    monkeypatch.setattr(check_html, "MAX_THUMBNAILS", 2)
    assert len(Reader(page([report] * 3, max_pixels=10**6)).pictures) == 2


def _parquet(folder: Path, images: list[bytes]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = record("<image>?", "yes")["conversations"]
    rows = [{"image": {"bytes": data, "path": None}, "conversations": turns} for data in images]
    path = folder / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def _shards(folder: Path, images: list[bytes]) -> Path:
    for number, data in enumerate(images):
        (folder / f"{number}.png").write_bytes(data)
    records = [record("<image>?", "yes", f"{number}.png") for number in range(len(images))]
    return Path(make_shards(folder, records).path)


@pytest.mark.parametrize("make", [_parquet, _shards])
def test_images_that_came_with_their_records_have_thumbnails(
    tmp_path: Path, make: Callable[[Path, list[bytes]], Path]
) -> None:
    if make is _parquet:
        pytest.importorskip("pyarrow")
    save_image(tmp_path / "sound.png", 0)
    sound = (tmp_path / "sound.png").read_bytes()
    first, second = (Image.new("RGB", (80, 40), colour) for colour in ("red", "blue"))
    moving = io.BytesIO()
    first.save(moving, "GIF", save_all=True, append_images=[second])
    path = make(tmp_path, [sound, moving.getvalue(), b"no image", sound])
    checks = check_records(
        records_of(path, tmp_path), RecordChecker(tmp_path, 10**6), path=str(path)
    )
    *_, (report, _, _) = checks
    assert set(report.problems) == {"animated_image", "broken_image"}
    (source,) = Reader(page([report], max_pixels=10**6)).pictures
    image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB")
    assert image.getpixel((5, 5)) == pytest.approx((255, 0, 0), abs=8)


@given(
    lengths=st.dictionaries(st.integers(0, 10**7), st.integers(1, 10**6), min_size=1),
    budget=st.integers(1, 10**5),
)
def test_every_record_is_in_the_histogram(lengths: dict[int, int], budget: int) -> None:
    drawing = "\n".join(histogram(Counter(lengths), budget))
    Reader(drawing)
    numbers = re.findall(r"<title>\d+ to \d+: (\d+)</title>", drawing)
    assert sum(map(int, numbers)) == sum(lengths.values())
    places = re.findall(r'(?:x|y|x1|x2|width|height)="(-?[\d.]+)"', drawing)
    assert all(0 <= float(place) <= 680 for place in places)

"""The findings about a data set as one HTML page, which needs no network and no other file.

It shows text, names and pictures that nobody has checked: texts are escaped, pictures are decoded
here by the loader's rules and drawn anew as small PNGs, and the page allows no script. Those that
came with their records are read again, for the few records that are shown.
"""

import base64
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from megatron_dattn.data.check_report import Example, ProblemCount, Report, describe_lengths
from megatron_dattn.data.image_decoding import decode_image
from megatron_dattn.data.image_files import ImageRoot, images_of, read_image_file
from megatron_dattn.data.problems import PROBLEMS
from megatron_dattn.data.record_files import open_rows
from megatron_dattn.errors import DataError

THUMBNAIL_SIDE = 64
MAX_THUMBNAILS = 100  # on a page: some kB each

_BARS = 40
_WIDTH, _HEIGHT, _MARGIN = 640, 160, 20
_ABOUT = {problem.name: problem.about for problem in PROBLEMS}

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Data check</title>
<style>
body { font: 14px sans-serif; margin: 2em; max-width: 75em; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid #ccc; padding: 0.3em 0.8em; }
th, td { text-align: left; vertical-align: top; }
td.number { text-align: right; }
li { margin: 0.3em 0; overflow-wrap: anywhere; }
img { vertical-align: middle; margin-right: 0.5em; border: 1px solid #ccc; }
rect { fill: #4a78b5; } rect.over { fill: #c0392b; }
line { stroke: #c0392b; stroke-dasharray: 4; }
</style>
</head>
<body>
<h1>Data check</h1>
"""


def page(reports: Sequence[Report], *, max_pixels: int) -> str:
    """The whole page.

    Args:
        max_pixels: of an image that is decoded for a thumbnail.
    """
    thumbnails = _Thumbnails(max_pixels)
    sections = ("\n".join(_section(report, thumbnails)) for report in reports)
    return _HEAD + "\n".join(sections) + "\n</body>\n</html>\n"


class _Thumbnails:
    """Makes small pictures of images, up to a number of them."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._left = MAX_THUMBNAILS

    def of_examples(self, report: Report, examples: Iterable[Example]) -> dict[Example, str]:
        """Elements of the page for examples that have an image."""
        shown = sorted((each for each in examples if each.image), key=lambda each: each.number)
        try:
            return {each: self._of(root, each.image or "") for each, root in _roots(report, shown)}
        except (DataError, OSError):  # it has been read before, but that is no reason to fail
            return {}

    def _of(self, root: ImageRoot, path: str) -> str:
        """An image as an element; nothing where it cannot be decoded."""
        if self._left == 0:
            return ""
        try:
            image = decode_image(read_image_file(root, path), max_pixels=self._max_pixels)
        except (DataError, MemoryError):
            return ""
        self._left -= 1
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<img alt="" src="data:image/png;base64,{data}">'


def _roots(report: Report, examples: Sequence[Example]) -> Iterator[tuple[Example, ImageRoot]]:
    """Where the images of examples are, which ascend by record."""
    root = str(report.image_root)
    rows = open_rows(Path(report.path)) if examples else None
    if rows is None:
        yield from ((each, root) for each in examples)
        return
    numbers = dict.fromkeys(each.number for each in examples)
    for number, record in rows.rows(numbers):
        for each in examples:
            if each.number == number:
                yield each, images_of(record, root)


def _section(report: Report, thumbnails: _Thumbnails) -> Iterator[str]:
    """One file."""
    outcomes = report.outcomes
    yield f"<h2>{_text(report.path)}</h2>"
    yield (
        f"<p>{report.num_records} records with {report.num_images} images. Training would use "
        f"{outcomes['used'] + outcomes['fixed']} of them ({outcomes['fixed']} after a fix), skip "
        f"{outcomes['skipped']} and stop at {outcomes['failed']}.</p>"
    )
    yield "<table>"
    heads = ("problem", "what it is", "found", "fixed", "skipped", "stopped")
    yield "<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"
    duplicates = [(name, count) for name, count in report.duplicates.items() if count.count]
    found = [*report.in_order(), *duplicates]
    for name, count in found:
        yield _row(name, count)
    yield "</table>"
    for what, lengths, budget in report.lengths():
        yield f"<h3>{what} of a record</h3>\n<p>{describe_lengths(lengths, budget)}</p>"
        yield "\n".join(histogram(lengths, budget))
    examples = (example for _, count in found for example in count.examples)
    pictures = thumbnails.of_examples(report, examples)
    for name, count in found:
        yield f"<h3>{_text(name)}: {count.count}</h3>\n<ul>"
        for example in count.examples:
            text = f"{_text(example.record)}: {_text(example.message)}"
            yield f"<li>{pictures.get(example, '')}{text}</li>"
        yield "</ul>"


def _row(name: str, count: ProblemCount) -> str:
    numbers = [count.count, *(count.records[each] for each in ("fixed", "skipped", "failed"))]
    cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
    return f"<tr><td>{_text(name)}</td><td>{_text(_ABOUT[name])}</td>{cells}</tr>"


def _text(text: str) -> str:
    """Text for the page: nothing in it is markup, and half characters are spelled out."""
    return escape(text.encode("utf-8", "backslashreplace").decode())


def histogram(lengths: Counter[int], budget: int) -> Iterator[str]:
    """A drawing of how many records have which length, with the budget as a line.

    Lengths beyond twice the budget share the last bar: one record of a million tokens would leave
    no room for the others.
    """
    end = max(1, min(max(lengths), 2 * budget))
    width = -(-end // _BARS)
    bars = Counter[int]()
    for length, number in lengths.items():
        bars[min(length, end) // width] += number
    highest, count = max(bars.values()), end // width + 1
    step = _WIDTH / count
    yield f'<svg width="{_WIDTH + 2 * _MARGIN}" height="{_HEIGHT + 2 * _MARGIN}">'
    for bar, number in sorted(bars.items()):
        height = max(1.0, _HEIGHT * number / highest)
        over = ' class="over"' if bar * width > budget else ""
        yield (
            f'<rect{over} x="{_MARGIN + bar * step:.1f}" y="{_MARGIN + _HEIGHT - height:.1f}" '
            f'width="{max(1.0, step - 1):.1f}" height="{height:.1f}">'
            f"<title>{bar * width} to {(bar + 1) * width - 1}: {number}</title></rect>"
        )
    if budget < count * width:
        place = f"{_MARGIN + budget / width * step:.1f}"
        yield f'<line x1="{place}" x2="{place}" y1="0" y2="{_MARGIN + _HEIGHT}"/>'
    below = _HEIGHT + 2 * _MARGIN - 4
    yield f'<text x="{_MARGIN}" y="{below}">0</text>'
    last = f"{end}{' and more' if end < max(lengths) else ''}"
    yield f'<text x="{_MARGIN + _WIDTH}" y="{below}" text-anchor="end">{last}</text>'
    yield "</svg>"

"""Find what is wrong with data before training on it.

    python tools/check_data.py --config model.yaml --config stage1.yaml
    python tools/check_data.py data.json --image-root images/ --tokenizer run/tokenizer

With --config it takes the run's own settings (template, budgets, image size, ...) and, where no
file is named, checks all its data sets. Reads every record and decodes every image by the rules of
the data loader; prints a table by problem, with what training would do about it, and writes it as
JSON (--report) or as one HTML page with thumbnails and histograms (--html). --list names every
record that training would not use, for prepare_data.py --without. Exits with 0 if all would be used
and with 2 otherwise; with --missing skip, missing images are reported but do not count. Without a
tokenizer, lengths and control tokens are not checked.
"""

import argparse
import json
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megatron_dattn.data.templates import TEMPLATE_NAMES
from megatron_dattn.errors import EXIT_USER_ERROR, ConfigError
from megatron_dattn.runtime.os_errors import named
from megatron_dattn.runtime.tool import ToolParser, run_tool

if TYPE_CHECKING:
    from megatron_dattn.data.check import RecordChecker
    from megatron_dattn.data.check_report import Report

_BYTES_FOR_PROCESSES = 2**19  # of a file for whose checks it is worth to start them
_IMAGE_SIZE, _PATCH_SIZE = 384, 14


def positive(text: str) -> int:
    """A number of at least one."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("inputs", type=Path, nargs="*", help=".json or .jsonl files")
    parser.add_argument(
        "--config", action="append", default=[], help="the run's YAML file; may come several times"
    )
    parser.add_argument("--image-root", type=Path, help="images' folder; else each input's own")
    parser.add_argument("--missing", choices=["fail", "skip"], default="fail")
    parser.add_argument("--report", type=Path, help="JSON file to write")
    parser.add_argument("--html", type=Path, help="HTML page to write")
    parser.add_argument("--list", type=Path, help="file that names every record not to be used")
    parser.add_argument(
        "--list-duplicates", action="store_true", help="repeated records go into --list too"
    )
    parser.add_argument(
        "--list-duplicate-images",
        action="store_true",
        help="records with an image of an earlier one under another name go into --list too",
    )
    parser.add_argument("--workers", type=positive, default=cores, help="checks at a time")
    parser.add_argument("--max-image-pixels", type=positive)
    parser.add_argument("--tokenizer", help="folder of the tokenizer")
    parser.add_argument("--template", choices=TEMPLATE_NAMES)
    parser.add_argument("--visual-budget", type=positive)
    parser.add_argument("--text-budget", type=positive)
    parser.add_argument("--image-size", type=positive, help=f"{_IMAGE_SIZE} without --config")
    parser.add_argument("--patch-size", type=positive, help=f"{_PATCH_SIZE} without --config")
    return parser.parse_args(arguments)


def make_checkers(options: argparse.Namespace) -> list[tuple[Path, "RecordChecker"]]:
    """The files to check, each with what checks it.

    Raises:
        ConfigError: nothing is named, or the settings do not fit each other.
    """
    from megatron_dattn.config.cli import load_config
    from megatron_dattn.data.check import RecordChecker
    from megatron_dattn.data.config import DataConfig
    from megatron_dattn.data.encoder import ModelSizes, SampleEncoder, sample_encoder
    from megatron_dattn.data.images import ImagePreprocessor
    from megatron_dattn.data.template import ConversationTokenizer
    from megatron_dattn.data.tokenizer import load_tokenizer

    run = load_config(*options.config) if options.config else None
    settings = ("tokenizer", "template", "visual_budget", "text_budget", "max_image_pixels")
    given = {name: value for name in settings if (value := getattr(options, name)) is not None}
    data = replace(run.data if run is not None else DataConfig(), **given)
    encoder = None
    if run is not None:
        if options.image_size or options.patch_size:
            raise ConfigError("--image-size and --patch-size are the model's; leave them out")
        model = run.model
        sizes = ModelSizes(model.vision.image_size, model.image_grid, model.language.vocab_size)
        encoder, _ = sample_encoder(data, sizes)
    elif data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer, template=data.template)
        image_size = options.image_size or _IMAGE_SIZE
        side = image_size // (options.patch_size or _PATCH_SIZE)
        encoder = SampleEncoder(
            tokenizer=ConversationTokenizer(tokenizer, data.template),
            preprocessor=ImagePreprocessor(image_size),
            grid=(side, side),
            visual_budget=data.visual_budget,
            text_budget=data.text_budget,
        )
    files = [(path, options.image_root or path.parent) for path in options.inputs]
    if not files:
        entries = [
            (Path(entry.path), entry.image_root) for entry in (*data.train, *data.validation)
        ]
        files = [(path, Path(options.image_root or root or path.parent)) for path, root in entries]
    if not files:
        raise ConfigError("name files to check, or the run's --config files")
    policies = data.resolved_policies
    return [
        (path, RecordChecker(root, data.max_image_pixels, encoder, policies))
        for path, root in files
    ]


def check_file(
    path: Path, checker: "RecordChecker", options: argparse.Namespace, listing: TextIO | None
) -> "Report":
    from tqdm import tqdm

    from megatron_dattn.data.check import check_records, records_of
    from megatron_dattn.data.check_report import Report
    from megatron_dattn.data.problems import DUPLICATE_IMAGE, DUPLICATE_RECORD
    from megatron_dattn.runtime.log import quiet_libraries

    quiet_libraries()
    large = path.is_file() and path.stat().st_size > _BYTES_FOR_PROCESSES
    checks = check_records(
        records_of(path, checker.image_root),
        checker,
        path=str(path),
        workers=options.workers,
        processes=large,
    )
    report = Report(str(path), checker.image_root)

    def note(number: int, problems: list[str], message: str) -> None:
        if listing is not None:
            entry = {"path": os.path.abspath(path), "record": number, "reasons": problems}
            listing.write(json.dumps({**entry, "message": message}) + "\n")

    # disable=None: no bar where there is no terminal.
    for grown, number, checked in tqdm(checks, desc=path.name, unit=" records", disable=None):
        report = grown
        if rejections := checked.rejections:
            note(number, [str(each.problem) for each in rejections], rejections[0].message)
    for problem, wanted in (
        (DUPLICATE_RECORD, options.list_duplicates),
        (DUPLICATE_IMAGE, options.list_duplicate_images),
    ):
        for number, first in report.repeats[problem] if wanted else ():
            note(int(number), [problem], f"as record {first}")
    return report


def check(options: argparse.Namespace) -> int:
    checkers = make_checkers(options)
    with ExitStack() as stack:
        listing = None
        if options.list is not None:
            with named(options.list):
                listing = stack.enter_context(options.list.open("w", encoding="utf-8"))
        reports = [check_file(path, one, options, listing) for path, one in checkers]
    for report in reports:
        print(report.table())
    if options.report is not None:
        content = {"files": [report.as_dict() for report in reports]}
        with named(options.report):
            options.report.write_text(json.dumps(content, indent=2) + "\n")
    if options.html is not None:
        write_html(options.html, reports, checkers[0][1].max_pixels)
    ignore_missing = options.missing == "skip"
    failed = any(report.has_problems(ignore_missing=ignore_missing) for report in reports)
    return EXIT_USER_ERROR if failed else 0


def write_html(path: Path, reports: list["Report"], max_pixels: int) -> None:
    from megatron_dattn.data.check_html import page

    with named(path):
        path.write_text(page(reports, max_pixels=max_pixels), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_tool(lambda: check(options))


if __name__ == "__main__":
    sys.exit(main())

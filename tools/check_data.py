"""Find what is wrong with LLaVA-format data before training on it.

    python tools/check_data.py data.json --image-root images/ --tokenizer run/tokenizer

Reads every record and decodes every image by the rules of the data loader; prints a table by reason
and, with --report, writes a JSON file. Exits with 0 if all is well and with 2 otherwise; with
--missing skip, missing images are reported but do not count. Without --tokenizer, lengths and
control tokens are not checked.
"""

import argparse
import json
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dattn.data.templates import TEMPLATE_NAMES
from megatron_dattn.errors import EXIT_USER_ERROR
from megatron_dattn.runtime.os_errors import named
from megatron_dattn.runtime.tool import run_tool

if TYPE_CHECKING:
    from megatron_dattn.data.check import Report
    from megatron_dattn.data.encoder import SampleEncoder


def positive(text: str) -> int:
    """A number of at least one."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", type=Path, nargs="+", help=".json or .jsonl files")
    parser.add_argument("--image-root", type=Path, help="images' folder; else each input's own")
    parser.add_argument("--missing", choices=["fail", "skip"], default="fail")
    parser.add_argument("--report", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=positive, default=4, help="images decoded at a time")
    parser.add_argument("--max-image-pixels", type=positive, default=40_000_000)
    parser.add_argument("--tokenizer", help="folder of the tokenizer")
    parser.add_argument("--template", choices=TEMPLATE_NAMES, default="mistral_v3")
    parser.add_argument("--visual-budget", type=positive, default=5832)
    parser.add_argument("--text-budget", type=positive, default=4096)
    parser.add_argument("--image-size", type=positive, default=384)
    parser.add_argument("--patch-size", type=positive, default=14)
    return parser.parse_args(arguments)


def make_encoder(arguments: argparse.Namespace) -> "SampleEncoder | None":
    """The loader's encoder with the run's budgets, if a tokenizer is given."""
    if arguments.tokenizer is None:
        return None
    from megatron_dattn.data.encoder import SampleEncoder
    from megatron_dattn.data.images import ImagePreprocessor
    from megatron_dattn.data.template import ConversationTokenizer
    from megatron_dattn.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer, template=arguments.template)
    side = arguments.image_size // arguments.patch_size
    return SampleEncoder(
        tokenizer=ConversationTokenizer(tokenizer, arguments.template),
        preprocessor=ImagePreprocessor(arguments.image_size),
        grid=(side, side),
        visual_budget=arguments.visual_budget,
        text_budget=arguments.text_budget,
    )


def check_file(
    path: Path, arguments: argparse.Namespace, encoder: "SampleEncoder | None"
) -> "Report":
    from tqdm import tqdm

    from megatron_dattn.data.check import RecordChecker, check_records
    from megatron_dattn.data.prepare import read_records
    from megatron_dattn.runtime.log import quiet_libraries

    quiet_libraries()
    records = read_records(path)
    checker = RecordChecker(
        arguments.image_root or path.parent, arguments.max_image_pixels, encoder
    )
    reports = check_records(records, checker, path=str(path), num_threads=arguments.threads)
    # disable=None: no bar where there is no terminal.
    last = deque(tqdm(reports, total=len(records), desc=path.name, disable=None), maxlen=1)
    return last[0]


def check(options: argparse.Namespace) -> int:
    encoder = make_encoder(options)
    reports = [check_file(path, options, encoder) for path in options.inputs]
    for report in reports:
        print(report.table())
    if options.report is not None:
        content = {"files": [report.as_dict() for report in reports]}
        with named(options.report):
            options.report.write_text(json.dumps(content, indent=2) + "\n")
    ignore_missing = options.missing == "skip"
    failed = any(report.has_problems(ignore_missing=ignore_missing) for report in reports)
    return EXIT_USER_ERROR if failed else 0


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_tool(lambda: check(options))


if __name__ == "__main__":
    sys.exit(main())

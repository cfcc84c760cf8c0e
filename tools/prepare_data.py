"""Prepare data for training.

    python tools/prepare_data.py llava_v1_5_mix665k.json --image-root images/ --output prepared/
    python tools/prepare_data.py --mixture stage3.yaml --output prepared/
    python tools/prepare_data.py data/ --layout webdataset --workers 16 --output prepared/

An input is a file of LLaVA's records or chat messages (.json, .jsonl), parquet files with images in
them (a file, a folder, or a pattern such as 'data/train-*.parquet' in quotes), or a folder of
shards. A mixture is a YAML file with a list `datasets` of `json_path`, `image_root`, `weight` and
`sampling_strategy` (all, first:1000, end:10%, random:50%).

Layout `jsonl` writes one .jsonl and its index per input and leaves images where they are; those of
parquet files and shards go into --images-out. Layout `webdataset` writes a folder per input, an
Energon WebDataset: tars of --shard-records records with their images, made by --workers processes.
Both write `prepared/train.yaml`, to pass to pretrain_vlm.py with --config; the folder may be moved.
What is there already, made in the same way from the same file, is left as it is.

An epoch of training shows every selected record once, or `weight` times where a file has a weight:
a file's share of the training is its selected records times its weight over the sum of that. The
weights stand in train.yaml. A recipe that lists the data sets itself, under data.train, decides in
its place if it comes after it on the command line, weights included.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dattn.errors import ConfigError
from megatron_dattn.runtime.tool import ToolParser, run_tool

if TYPE_CHECKING:
    from megatron_dattn.data.prepare_targets import OutputLayout, Prepared

_SHARD_RECORDS = 10_000


def positive(text: str) -> int:
    """A number of at least one."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("inputs", type=Path, nargs="*", help="files or folders of records")
    parser.add_argument("--mixture", type=Path, help="YAML file that names the inputs")
    parser.add_argument("--image-root", type=Path, help="images' folder; else each input's own")
    parser.add_argument("--output", type=Path, required=True, help="folder for what is prepared")
    parser.add_argument("--section", choices=["train", "validation"], default="train")
    parser.add_argument("--layout", choices=["jsonl", "webdataset"], default="jsonl")
    parser.add_argument(
        "--shard-records", type=positive, metavar="N", help=f"of a shard ({_SHARD_RECORDS})"
    )
    parser.add_argument(
        "--shard-megabytes", type=positive, metavar="N", help="a shard is not larger; no limit"
    )
    parser.add_argument(
        "--images-out", type=Path, help="folder for the images of parquet files, with layout jsonl"
    )
    parser.add_argument(
        "--workers", type=positive, default=1, help="processes that write shards (1)"
    )
    parser.add_argument(
        "--drop-missing",
        action="store_true",
        help="leave out records whose images are not there; a file missing.txt lists them",
    )
    parser.add_argument(
        "--without", type=Path, help="list of records to leave out, by check_data.py --list"
    )
    parser.add_argument(
        "--validation-share",
        type=float,
        help="split off so many of the records (0.01) as validation, by image",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="for sampling strategy random and --validation-share"
    )
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> int:
    # Imported late: --help should not wait for it.
    from tqdm import tqdm

    from megatron_dattn.data.mixture import Source, read_mixture
    from megatron_dattn.data.prepare import prepare
    from megatron_dattn.data.prepare_targets import Choice
    from megatron_dattn.data.validation_split import prepare_with_validation

    if bool(arguments.inputs) == (arguments.mixture is not None):
        raise ConfigError("name either input files or --mixture")
    if arguments.mixture is not None:
        sources = read_mixture(arguments.mixture)
    else:
        sources = [Source(path, arguments.image_root) for path in arguments.inputs]
    choice = Choice(arguments.seed, arguments.drop_missing, arguments.without)
    share, sections = arguments.validation_share, [arguments.section]
    start: Callable[..., Iterator[Prepared]] = partial(prepare, section=arguments.section)
    if share is not None:
        if arguments.section != "train":
            raise ConfigError("--validation-share makes both sections; leave --section out")
        sections = ["train", "validation"]
        start = partial(prepare_with_validation, share=share)
    done: list[Prepared] = []
    # disable=None: no bar where there is no terminal.
    with tqdm(unit=" records", disable=None) as bar:
        for file in start(
            sources,
            arguments.output,
            choice=choice,
            layout=_layout(arguments),
            on_records=bar.update,
        ):
            done.append(file)
            bar.clear()
            print(f"[{len(done)}/{len(sources) * len(sections)}] {_line(file)}", flush=True)
    configs = [f"--config {arguments.output / section}.yaml" for section in sections]
    print(f"train with {' '.join(configs)}")
    if all(file.was_there for file in done):
        print("nothing has changed: all of it was there already", file=sys.stderr)
    return 0


def _layout(arguments: argparse.Namespace) -> "OutputLayout":
    from megatron_dattn.data.prepare_targets import OutputLayout
    from megatron_dattn.data.prepared_shards import ShardSize

    shards = None
    if arguments.layout == "webdataset":
        records = arguments.shard_records or _SHARD_RECORDS
        shards = ShardSize(records, arguments.shard_megabytes)
    elif arguments.shard_records or arguments.shard_megabytes:
        raise ConfigError("--shard-records and --shard-megabytes need --layout webdataset")
    return OutputLayout(shards, arguments.images_out, arguments.workers)


def _line(file: "Prepared") -> str:
    line = f"{file.source.path}: {file.num_records} records -> {file.path}"
    if file.num_missing:
        line += f" ({file.num_missing} without their images left out, see {file.missing_list})"
    if file.num_absent:
        line += (
            f" ({file.num_absent} images are not there: --drop-missing leaves their records out)"
        )
    return line


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_tool(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

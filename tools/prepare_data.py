"""Prepare LLaVA-format data for training.

    python tools/prepare_data.py llava_v1_5_mix665k.json --image-root images/ --output prepared/
    python tools/prepare_data.py --mixture stage3.yaml --output prepared/

Writes one .jsonl and its index per input, and `prepared/train.yaml` to pass to pretrain_vlm.py with
--config; the folder may be moved. What is there already, made in the same way from the same file,
is left as it is. A mixture is a YAML file with a list `datasets` of `json_path`, `image_root`,
`weight` and `sampling_strategy` (all, first:1000, end:10%, random:50%). Images are left where they
are.

An epoch of training shows every selected record once, or `weight` times where a file has a weight:
a file's share of the training is its selected records times its weight over the sum of that. The
weights stand in train.yaml. A recipe that lists the .jsonl files itself, under data.train, decides
in its place if it comes after it on the command line, weights included.
"""

import argparse
import sys
from pathlib import Path

from megatron_dattn.errors import ConfigError
from megatron_dattn.runtime.tool import ToolParser, run_tool


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("inputs", type=Path, nargs="*", help=".json or .jsonl files")
    parser.add_argument("--mixture", type=Path, help="YAML file that names the inputs")
    parser.add_argument("--image-root", type=Path, help="images' folder; else each input's own")
    parser.add_argument("--output", type=Path, required=True, help="folder for the prepared files")
    parser.add_argument("--section", choices=["train", "validation"], default="train")
    parser.add_argument(
        "--drop-missing",
        action="store_true",
        help="leave out records whose images are not there; OUTPUT/NAME.missing.txt lists them",
    )
    parser.add_argument(
        "--without", type=Path, help="list of records to leave out, by check_data.py --list"
    )
    parser.add_argument("--seed", type=int, default=0, help="for sampling strategy random")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> int:
    # Imported late: --help should not wait for it.
    from megatron_dattn.data.mixture import Source, read_mixture
    from megatron_dattn.data.prepare import Choice, prepare

    if bool(arguments.inputs) == (arguments.mixture is not None):
        raise ConfigError("name either input files or --mixture")
    if arguments.mixture is not None:
        sources = read_mixture(arguments.mixture)
    else:
        sources = [Source(path, arguments.image_root) for path in arguments.inputs]
    done = prepare(
        sources,
        arguments.output,
        section=arguments.section,
        choice=Choice(arguments.seed, arguments.drop_missing, arguments.without),
    )
    for number, file in enumerate(done, start=1):
        counted = f"[{number}/{len(sources)}] {file.source.path}: {file.num_records} records"
        line = f"{counted} -> {file.path}"
        if file.num_missing:
            line += f" ({file.num_missing} without their images left out, see {file.missing_list})"
        print(line, flush=True)
    print(f"train with --config {arguments.output / arguments.section}.yaml")
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_tool(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

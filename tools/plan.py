"""Rank parallel layouts of a run on so many GPUs by modelled step time, with memory per rank.

    python tools/plan.py --config model.yaml --config stage2.yaml --gpus 1024 --gpu h100 \\
        --yaml layout.yaml --picture layouts.png -- --data.visual_budget 11776

Needs no GPU. What stands behind `--` are settings, as for pretrain_vlm.py, which takes the YAML
file as a further --config. Times are modelled: docs/planning.md says of what.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dattn.errors import ConfigError, UserError
from megatron_dattn.planner.hardware import GPUS, Assumptions, Cluster
from megatron_dattn.runtime.log import silence_import_warnings
from megatron_dattn.runtime.os_errors import explain
from megatron_dattn.runtime.tool import ToolParser, run_tool

if TYPE_CHECKING:
    from megatron_dattn.training.layout_search import LayoutSearch, PlannedLayout


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = _parser().parse_args(arguments)
    return run_tool(lambda: _plan(options))


def _plan(options: argparse.Namespace) -> int:
    cluster = _cluster(options)
    if options.recipe:
        return _recommend(options, cluster)
    if not options.config:
        raise ConfigError("name a configuration (--config) or a recipe's folder (--recipe)")
    if len(options.gpus) > 1 and (options.json or options.picture or options.yaml):
        raise ConfigError("--json, --picture and --yaml are of one number of GPUs: name one")
    # Imported late: --help should not wait for torch.
    silence_import_warnings()
    from megatron_dattn.training.layout_report import table

    for num_gpus in options.gpus:
        search = _search(options.config, num_gpus, options, cluster)
        print(table(search, options.rows, num_gpus, cluster))
        _write(search, num_gpus, options, cluster)
    return 0


def _recommend(options: argparse.Namespace, cluster: Cluster) -> int:
    silence_import_warnings()
    from megatron_dattn.training.layout_report import MODELLED, assumed, recommendations

    model, stages = options.recipe / "model.yaml", sorted(options.recipe.glob("stage*.yaml"))
    fastest = [
        _search([model, stage], num_gpus, options, cluster).fitting[0]
        for stage in stages
        for num_gpus in options.gpus
    ]
    if not fastest:
        raise ConfigError(f"'{options.recipe}' holds no stage*.yaml beside model.yaml")
    print(f"{MODELLED} {assumed(cluster.assumed)}\n\n{recommendations(fastest)}")
    return 0


def _search(
    files: list[Path], num_gpus: int, options: argparse.Namespace, cluster: Cluster
) -> "LayoutSearch":
    from megatron_dattn.config.cli import parse_command_line
    from megatron_dattn.training.layout_search import search_layouts

    words = [word for path in files for word in ("--config", str(path))]
    command = parse_command_line([*words, *options.settings], prog="tools/plan.py")
    return search_layouts(command.config, num_gpus, cluster, options.min_text_budget)


def _cluster(options: argparse.Namespace) -> Cluster:
    if not 0 < options.efficiency <= 1:
        raise ConfigError(f"--efficiency is a share of 1; it is {options.efficiency}")
    counts = [*options.gpus, options.gpus_per_node, options.rows, options.min_text_budget]
    if min(counts) < 1:
        raise ConfigError("--gpus, --gpus-per-node, --rows and --min-text-budget are at least 1")
    assumed = dataclasses.replace(Assumptions(), products=options.efficiency)
    return Cluster(GPUS[options.gpu], options.gpus_per_node, assumed)


def _write(
    search: "LayoutSearch", num_gpus: int, options: argparse.Namespace, cluster: Cluster
) -> None:
    from megatron_dattn.training.layout_report import as_json, as_yaml

    shown = search.distinct()[: options.rows]
    if options.yaml:
        if not 1 <= options.choose <= len(shown):
            raise ConfigError(f"--choose {options.choose} is none of the {len(shown)} rows")
        _write_text(options.yaml, as_yaml(shown[options.choose - 1]))
    if options.json:
        answer = as_json(search, options.rows, num_gpus, cluster)
        _write_text(options.json, json.dumps(answer, indent=2) + "\n")
    if options.picture:
        _draw(shown, num_gpus, options.picture, cluster)


def _draw(layouts: list["PlannedLayout"], num_gpus: int, path: Path, cluster: Cluster) -> None:
    from megatron_dattn.planner.layout_drawing import DrawnLayout, draw_layouts
    from megatron_dattn.training.layout_report import MODELLED, short_name

    drawn = [DrawnLayout(short_name(layout), layout.time, layout.memory) for layout in layouts]
    stage = layouts[0].config.training.stage
    title = f"{stage} on {num_gpus} {cluster.gpu.name}. {MODELLED}"
    draw_layouts(drawn, title, cluster.gpu.memory, path)


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(explain(error, path)) from error


def _parser() -> argparse.ArgumentParser:
    assumed = Assumptions()
    parser = ToolParser(__doc__)
    parser.add_argument("--config", type=Path, action="append", help="as for pretrain_vlm.py")
    parser.add_argument(
        "--recipe",
        type=Path,
        help="a folder with model.yaml and stage*.yaml: print the fastest layout of every stage "
        "and number of GPUs as a Markdown table",
    )
    parser.add_argument("--gpus", type=int, nargs="+", required=True, help="their number")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument(
        "--efficiency",
        type=float,
        default=assumed.products,
        help="share of the peak that matrix products get, an assumption (default: %(default)s)",
    )
    parser.add_argument(
        "--min-text-budget",
        type=int,
        default=1024,
        help="text tokens that a pack keeps, however few samples it has (default: %(default)s)",
    )
    parser.add_argument("--rows", type=int, default=10, help="layouts to show")
    parser.add_argument("--yaml", type=Path, help="write the settings of a layout")
    parser.add_argument("--choose", type=int, default=1, help="row whose settings are written")
    parser.add_argument("--json", type=Path, help="write all numbers of the rows")
    parser.add_argument("--picture", type=Path, help="draw the rows: .png, .svg, ...")
    parser.add_argument("settings", nargs="*", help="behind --: settings, as for pretrain_vlm.py")
    return parser


if __name__ == "__main__":
    sys.exit(main())

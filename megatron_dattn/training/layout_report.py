"""What `tools/plan.py` says of layouts: a table, JSON, settings as YAML, a page's recommendations.

All of it is modelled, and says so.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import yaml

from megatron_dattn.planner.hardware import Assumptions, Cluster
from megatron_dattn.training.layout_search import LayoutSearch, PlannedLayout

MODELLED = "Modelled, not measured: this code has run on no GPU."
_HEAD = (
    *("tensor", "pipeline", "data", "sequence", "optimizer", "recompute", "pack", "packs"),
    *("step s", "samples/s", "MFU %", "GB", "time goes to", "memory goes to"),
)


def table(search: LayoutSearch, rows: int, num_gpus: int, cluster: Cluster) -> str:
    """The fastest layouts, what each spends most time and memory on, and why others cannot be."""
    shown = search.distinct()[:rows]
    first = shown[0].config
    cells = [_HEAD, *(_row(layout) for layout in shown)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEAD))]
    lines = [
        f"{first.training.stage}, attention {first.model.attention}, global batch "
        f"{first.training.global_batch_size}, on {num_gpus} {cluster.gpu.name}, "
        f"{cluster.gpus_per_node} per node",
        f"{MODELLED} {assumed(cluster.assumed)}",
        "",
    ]
    for place, row in enumerate(cells):
        number = f"{place:>3}" if place else "   "
        words = (word.ljust(width) for word, width in zip(row, widths, strict=True))
        lines.append(f"{number}  {'  '.join(words)}".rstrip())
    lines += [
        "",
        "A pack: samples: visual + text tokens. Of each tensor, pipeline and pack size the fastest "
        f"of {len(search.fitting)} that fit is shown. Refused:",
    ]
    counts = sorted(search.refused.counts.items(), key=lambda item: -item[1])
    lines += [f"{count:>6}  {search.refused.first[reason]}" for reason, count in counts]
    return "\n".join(lines)


def assumed(values: Assumptions) -> str:
    """The assumptions in one line."""
    return (
        f"Assumed: {values.products:.0%} of the peak in products, {values.attention:.0%} in "
        f"attention, {values.memory:.0%} of the memory's bandwidth, {values.links:.0%} of the "
        f"links', {values.launch_seconds * 1e6:g} us per launch, {values.hop_seconds * 1e6:g} us "
        "per hop."
    )


def _row(layout: PlannedLayout) -> tuple[str, ...]:
    config = layout.config
    parallel, data = config.parallel, config.data
    return (
        str(parallel.tensor_model_parallel_size),
        _pipeline(layout),
        str(layout.plan.data_parallel_size),
        "yes" if parallel.sequence_parallel else "no",
        "distributed" if parallel.use_distributed_optimizer else "whole",
        config.execution.recompute,
        f"{config.training.micro_batch_size}: {data.visual_budget} + {data.text_budget}",
        str(layout.plan.num_microbatches),
        f"{layout.time.total:.3f}",
        f"{layout.samples_per_second:.1f}",
        f"{100 * layout.mfu:.1f}",
        f"{layout.memory.total / 1e9:.1f}",
        ", ".join(f"{words(name)} {100 * share:.0f} %" for name, share in _time_shares(layout)[:2]),
        layout.memory.largest,
    )


def short_name(layout: PlannedLayout) -> str:
    """The sizes of a layout, for a picture."""
    row = dict(zip(_HEAD, _row(layout), strict=True))
    switches = "" if row["recompute"] == "none" else f", {row['recompute']} recompute"
    return f"{row['tensor']} x {row['pipeline']} x {row['data']}, {row['pack']}{switches}"


def _pipeline(layout: PlannedLayout) -> str:
    """The number of pipeline stages, with their layers where they differ."""
    parallel = layout.config.parallel
    shares = parallel.layers_per_pipeline_stage(layout.config.model.language.num_hidden_layers)
    if len(set(shares)) == 1:
        return str(len(shares))
    middle = f", {len(shares) - 2} of {shares[1]}" if len(shares) > 2 else ""
    return f"{len(shares)} ({shares[0]}{middle}, {shares[-1]})"


def _time_shares(layout: PlannedLayout) -> list[tuple[str, float]]:
    terms, total = layout.time.terms, layout.time.total
    return sorted(((name, value / total) for name, value in terms.items()), key=lambda t: -t[1])


def words(term: str) -> str:
    """The name of a term as it is read."""
    return term.replace("_", " ")


def as_json(search: LayoutSearch, rows: int, num_gpus: int, cluster: Cluster) -> dict[str, Any]:
    """The same as plain data: seconds, bytes, settings."""
    return {
        "modelled": MODELLED,
        "num_gpus": num_gpus,
        "cluster": dataclasses.asdict(cluster),
        "layouts": [
            {
                "settings": settings(layout),
                "data_parallel_size": layout.plan.data_parallel_size,
                "num_microbatches": layout.plan.num_microbatches,
                "seconds": layout.time.total,
                "seconds_by_term": layout.time.terms,
                "bytes": layout.memory.total,
                "bytes_by_term": layout.memory.terms,
                "samples_per_second": layout.samples_per_second,
                "mfu": layout.mfu,
                "time_binds": _time_shares(layout)[0][0],
                "memory_binds": layout.memory.largest,
            }
            for layout in search.distinct()[:rows]
        ],
        "num_fitting": len(search.fitting),
        "refused": [
            {"count": count, "first": search.refused.first[reason]}
            for reason, count in search.refused.counts.items()
        ],
    }


def settings(layout: PlannedLayout) -> dict[str, dict[str, Any]]:
    """The settings that make a layout, by sections."""
    config = layout.config
    parallel = dataclasses.asdict(config.parallel)
    return {
        "parallel": {name: value for name, value in parallel.items() if "timeout" not in name},
        "execution": {"recompute": config.execution.recompute},
        "training": {"micro_batch_size": config.training.micro_batch_size},
        "data": {
            "visual_budget": config.data.visual_budget,
            "text_budget": config.data.text_budget,
        },
    }


def as_yaml(layout: PlannedLayout) -> str:
    """A file for a further --config of pretrain_vlm.py."""
    return (
        f"# {layout.config.training.stage} on {layout.plan.world_size} {layout.cluster.gpu.name}, "
        f"{layout.cluster.gpus_per_node} per node, by tools/plan.py.\n"
        f"# {MODELLED} A step of {layout.time.total:.3f} s, "
        f"{layout.memory.total / 1e9:.1f} GB per rank.\n"
        f"{yaml.safe_dump(settings(layout), sort_keys=False)}"
    )


def recommendations(fastest: Iterable[PlannedLayout]) -> str:
    """A Markdown table of layouts, a row each."""
    lines = [
        "| stage | GPUs | tensor x pipeline x data | pack: samples: tokens | packs per rank "
        "| recompute | step, s | MFU | GB | most time, then |",
        "|---|---:|---|---|---:|---|---:|---:|---:|---|",
    ]
    for layout in fastest:
        row = dict(zip(_HEAD, _row(layout), strict=True))
        cells = (
            layout.config.training.stage,
            str(layout.plan.world_size),
            f"{row['tensor']} x {row['pipeline']} x {row['data']}",
            row["pack"],
            row["packs"],
            row["recompute"],
            f"{layout.time.total:.2f}",
            f"{100 * layout.mfu:.0f} %",
            f"{layout.memory.total / 1e9:.0f}",
            row["time goes to"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

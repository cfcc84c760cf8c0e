"""The demo once per attention preset and seed, on the same data and backbones.

    python -m examples.quickstart.ablation --attention dattn s_attn --seeds 1 2 3 --length 0.5

The seed sets the initial adapter and the order of the data. Every run is one process, so several of
these commands with different presets may share a machine; started again, a command goes on where
it was. The table counts every finished run in the output folder.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from examples.quickstart.demo import Demo, prepare, run, train_and_evaluate
from megatron_dattn.attention import PRESETS


def table(output: Path) -> str:
    """Mean and spread over seeds of the held-out accuracy, per preset and category, in Markdown."""
    results: dict[str, list[dict[str, float]]] = {}
    for path in sorted(output.glob("*/seed*/accuracy.json")):
        scores = json.loads(path.read_text())
        accuracies = {name: 100 * one["accuracy"] for name, one in scores.items()}
        results.setdefault(path.parts[-3], []).append(accuracies)
    if not results:
        return "no finished run"
    categories = list(next(iter(results.values()))[0])
    lines = [
        "| attention | seeds | " + " | ".join(categories) + " |",
        "|---|---:|" + "---:|" * len(categories),
    ]
    for attention, runs in results.items():
        cells = [_mean_and_spread([one[category] for one in runs]) for category in categories]
        lines.append(f"| `{attention}` | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean_and_spread(values: list[float]) -> str:
    """Mean, and half the distance between the best and the worst."""
    return f"{statistics.mean(values):.1f} ± {(max(values) - min(values)) / 2:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attention", nargs="+", choices=PRESETS, default=["dattn", "s_attn"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--length", type=float, default=1.0, help="share of the demo's steps")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    for seed in arguments.seeds:
        for attention in arguments.attention:
            demo = Demo(
                output=output / attention / f"seed{seed}",
                shared=output / "shared",
                attention=attention,
                processes=1,
                training=("--training.seed", str(seed)),
                length=arguments.length,
            )
            run([*prepare(demo), *train_and_evaluate(demo)])
    print(table(output))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The demo once per attention preset and seed, on the same data and backbones.

    python -m examples.quickstart.ablation --attention dattn s_attn --seeds 1 2 3

The seed sets the initial adapter and the order of the data. Every run is one process, so several of
these commands with different presets may share a machine; started again, a command goes on where
it was. The table counts every finished run in the output folder, and those that `--results` names,
a file which the finished runs are added to: runs of several machines come together there.
"""

import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.quickstart.demo import STAGES, Demo, prepare, run, train_and_evaluate
from megatron_dattn.attention import PRESETS
from megatron_dattn.runtime.log import silence_import_warnings
from megatron_dattn.runtime.tool import ToolParser


@dataclass(frozen=True)
class Result:
    """What one finished run reached."""

    accuracy: dict[str, float]
    """Held-out accuracy in per cent by category; the last one is `all`."""
    loss: float
    """Validation loss of stage 3, after its last step."""

    @staticmethod
    def read(folder: Path) -> "Result":
        # Imported late: --help should not wait for torch and megatron-core.
        from megatron_dattn.checkpoint.discovery import find_checkpoint

        scores = json.loads((folder / "accuracy.json").read_text())
        found = find_checkpoint(folder / "stage3")
        assert found is not None, "an evaluated run has its checkpoint"
        return Result(
            {name: 100 * one["accuracy"] for name, one in scores.items()},
            found.manifest.facts["validation"]["loss"],
        )


def finished(output: Path) -> dict[str, dict[int, Result]]:
    """Results by preset and seed."""
    results: dict[str, dict[int, Result]] = {}
    for path in sorted(output.glob("*/seed*/accuracy.json")):
        seed = int(path.parent.name.removeprefix("seed"))
        results.setdefault(path.parts[-3], {})[seed] = Result.read(path.parent)
    return results


def merge_into(file: Path, results: dict[str, dict[int, Result]]) -> dict[str, dict[int, Result]]:
    """Add results to a JSON file, which may not exist yet; returns all that it holds then."""
    stored = json.loads(file.read_text()) if file.exists() else {}
    for attention, runs in results.items():
        stored.setdefault(attention, {}).update({str(n): asdict(run) for n, run in runs.items()})
    file.write_text(json.dumps(stored, indent=1) + "\n")
    return {
        attention: {int(seed): Result(**run) for seed, run in runs.items()}
        for attention, runs in stored.items()
    }


def table(results: dict[str, dict[int, Result]]) -> str:
    """Mean and spread over seeds, and every seed's accuracy, in Markdown."""
    if not results:
        return "no finished run"
    first = next(iter(next(iter(results.values())).values()))
    header = ["attention", *first.accuracy, "each seed", "validation loss"]
    lines = [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    for attention in (name for name in PRESETS if name in results):
        runs = results[attention]
        cells = [
            _mean_and_spread([run.accuracy[category] for run in runs.values()], 1)
            for category in first.accuracy
        ]
        cells.append(", ".join(f"{runs[seed].accuracy['all']:.1f}" for seed in sorted(runs)))
        cells.append(_mean_and_spread([run.loss for run in runs.values()], 3))
        lines.append(_row([f"`{attention}`", *cells]))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _mean_and_spread(values: list[float], digits: int) -> str:
    """Mean, and half the distance between the best and the worst."""
    spread = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def main() -> int:
    silence_import_warnings()
    parser = ToolParser(__doc__)
    parser.add_argument("--attention", nargs="+", choices=PRESETS, default=["dattn", "s_attn"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--steps", nargs=3, type=int, metavar="N", help="of each stage, if not the demo's"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument(
        "--results", type=Path, help="JSON file of finished runs, here and elsewhere"
    )
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
                steps=dict(zip(STAGES, arguments.steps or (), strict=False)),
            )
            run([*prepare(demo), *train_and_evaluate(demo)])
    results = finished(output)
    if arguments.results is not None:
        results = merge_into(arguments.results, results)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

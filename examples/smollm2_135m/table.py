"""The table of all evaluated runs below a folder, in Markdown: mean over seeds, and their number.

python -m examples.smollm2_135m.table runs/smollm2_135m
"""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from examples.smollm2_135m.easy_vqa import TYPES
from megatron_dattn.attention import PRESETS
from megatron_dattn.errors import EXIT_USER_ERROR
from megatron_dattn.runtime.tool import ToolParser

# README.md of github.com/vzhou842/easy-VQA-keras, of its --big-model; it trained on images that it
# generated itself, twice as many as the package has, and does not say which part was measured.
PUBLISHED = "99.5"
Scores = dict[str, Any]


def read_scores(folder: Path) -> dict[str, dict[int, Scores]]:
    """Scores by preset and seed."""
    runs: dict[str, dict[int, Scores]] = {}
    for path in sorted(folder.glob("*/seed*/scores.json")):
        seed = int(path.parent.name.removeprefix("seed"))
        runs.setdefault(path.parts[-3], {})[seed] = json.loads(path.read_text(encoding="utf-8"))
    return runs


def table(runs: dict[str, dict[int, Scores]]) -> str:
    """Columns are presets, rows are types of questions and what the language model kept."""
    names = [name for name in PRESETS if name in runs]
    first = next(iter(runs[names[0]].values()))
    lines = [
        _row(["accuracy on test questions, %", *(f"`{n}`" for n in names), "without looking"]),
        _row(["---", *["---:"] * (len(names) + 1)]),
    ]
    for key, title in {**TYPES, "all": "all"}.items():
        if key in first["accuracy"]:
            asked = first["accuracy"][key]["asked"]
            cells = [_spread(runs[n], partial(_accuracy, key)) for n in names]
            lines.append(_row([f"{title} ({asked})", *cells, f"{_blind(first, key):.1f}"]))
    rows: list[tuple[str, Callable[[Scores], float], int]] = [
        ("perplexity before", lambda one: one["perplexity"]["before"], 2),
        ("perplexity after", lambda one: one["perplexity"]["after"], 2),
        ("answers to 100 prompts unchanged, %", _same, 1),
        ("their tokens before the first change, %", _shared, 1),
    ]
    for title, value, digits in rows:
        lines.append(_row([title, *(_spread(runs[n], value, digits) for n in names), ""]))
    seeds = [", ".join(map(str, sorted(runs[n]))) for n in names]
    return "\n".join([*lines, _row(["seeds", *seeds, ""]), "", _notes(first)])


def _notes(first: Scores) -> str:
    asked = first["questions"]
    chosen = f"{asked['asked']} of {asked['of']} test questions"
    if asked["asked"] < asked["of"]:
        chosen += f", drawn with seed {asked['seed']}"
    steps = ", ".join(f"{name} {number}" for name, number in first["steps"].items())
    return (
        f"{chosen}; steps: {steps}; {first['precision']}; plain text: {first['text']}. The data "
        f"set's author reports {PUBLISHED} % for a classifier (README.md of easy-VQA-keras), "
        "trained on twice as many images, of his own making."
    )


def _accuracy(key: str, scores: Scores) -> float:
    return 100 * scores["accuracy"][key]["correct"] / scores["accuracy"][key]["asked"]


def _blind(scores: Scores, key: str) -> float:
    return 100 * scores["accuracy"][key]["blind"] / scores["accuracy"][key]["asked"]


def _same(scores: Scores) -> float:
    return 100 * scores["agreement"]["same"] / scores["agreement"]["prompts"]


def _shared(scores: Scores) -> float:
    return 100 * scores["agreement"]["shared_tokens"] / scores["agreement"]["tokens"]


def _spread(runs: dict[int, Scores], value: Callable[[Scores], float], digits: int = 1) -> str:
    """Mean over seeds, and half the distance between the largest and the smallest."""
    values = [value(one) for one in runs.values()]
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else mean


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = ToolParser(__doc__)
    parser.add_argument("folder", type=Path, help="output folder of the demo")
    options = parser.parse_args()
    runs = read_scores(options.folder)
    if not runs:
        print(f"error: {options.folder} holds no evaluated run", file=sys.stderr)
        return EXIT_USER_ERROR
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())

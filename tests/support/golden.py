"""A small run whose losses are kept in a file, so that no change moves them unnoticed.

    python -m tests.support.golden

writes the file anew: after a change that is meant to move losses, with a word in the commit message
why they move.
"""

import json
from pathlib import Path
from typing import Any

from megatron_dattn.training.step import train_step
from tests.support.distributed import run_distributed
from tests.support.training import build_run, training_config
from tests.support.vlm import make_batch

FILE = Path(__file__).resolve().parents[1] / "golden" / "losses.json"
PRESETS = ("dattn", "s_attn")
STEPS = 20
PACKS_PER_STEP = 2


def losses_of(preset: str) -> dict[str, list[float]]:
    """Loss and gradient norm of every step: one process, FP32, all modules trained.

    Weights and packs come from seeds of their own, whatever else draws random numbers. The packs
    have text alone, an image before the text and two within it, and samples of both kinds.
    """
    kinds = [([9, 6], [(), (0,)]), ([12], [(3, 7)]), ([4, 5, 6], [(1,), (), (2,)])]
    packs = [
        make_batch(*kinds[number % len(kinds)], seed=number)
        for number in range(STEPS * PACKS_PER_STEP)
    ]
    config = training_config(
        train_iters=STEPS, num_packs=PACKS_PER_STEP, attention=preset, warmup_ratio=0.1
    )
    run = build_run(config, packs)
    reports = [train_step(run) for _ in range(STEPS)]
    return {
        "loss": [report.loss for report in reports],
        "grad_norm": [report.grad_norm for report in reports],
    }


def all_losses() -> dict[str, Any]:
    """Of all presets, by preset."""
    return {preset: run_distributed(losses_of, 1, preset)[0] for preset in PRESETS}


def main() -> None:
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(all_losses(), indent=1) + "\n")
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()

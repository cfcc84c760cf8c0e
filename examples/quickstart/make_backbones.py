"""Pretrain the demo's two backbones and save them as Hugging Face checkpoints.

    python -m examples.quickstart.make_backbones --tokenizer outputs/quickstart/tokenizer \\
        --output outputs/quickstart/backbones

Writes <output>/siglip (SiglipVisionModel and its preprocessor_config.json) and <output>/mistral
(MistralForCausalLM and the tokenizer), the two folders that conversion takes, just as it takes the
published large ones.
"""

import multiprocessing
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers import AutoTokenizer

from examples.quickstart.language_backbone import pretrain_language
from examples.quickstart.scenes import PLACE_NAMES
from examples.quickstart.vision_backbone import pretrain_vision, save_vision
from megatron_dattn.errors import EXIT_USER_ERROR, DataError, UserError
from megatron_dattn.runtime.tool import ToolParser


def make_backbones(
    tokenizer_folder: Path,
    output: Path,
    grid: int = 2,
    seed: int = 0,
    vision_steps: int | None = None,
    language_steps: int | None = None,
) -> None:
    """Pretrain both models side by side and save them; None means the default number of steps."""
    if not (tokenizer_folder / "tokenizer.json").is_file():
        raise DataError(f"{tokenizer_folder} holds no tokenizer.json; run make_tokenizer first")
    # One thread each: at this size two processes are faster than two threads. Spawned, not forked:
    # a fork of a process that has used torch's threads may hang.
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(_make_vision, output / "siglip", grid, seed, vision_steps),
            pool.submit(
                _make_language, tokenizer_folder, output / "mistral", grid, seed, language_steps
            ),
        ]
        for job in jobs:
            job.result()


def _make_vision(folder: Path, grid: int, seed: int, num_steps: int | None) -> None:
    torch.set_num_threads(1)
    options = {} if num_steps is None else {"num_steps": num_steps}
    save_vision(pretrain_vision(grid=grid, seed=seed, **options), folder)


def _make_language(
    tokenizer_folder: Path, folder: Path, grid: int, seed: int, num_steps: int | None
) -> None:
    torch.set_num_threads(1)
    options = {} if num_steps is None else {"num_steps": num_steps}
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    pretrain_language(tokenizer, grid=grid, seed=seed, **options).save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder / file.name)


def main() -> int:
    """Command line; returns the exit code."""
    parser = ToolParser((__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="made by make_tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--grid", type=int, default=2, choices=sorted(PLACE_NAMES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        make_backbones(options.tokenizer, options.output, options.grid, options.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"{options.output}: siglip and mistral, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

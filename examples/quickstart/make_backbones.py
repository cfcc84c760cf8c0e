"""Pretrain the demo's two backbones and save them as Hugging Face checkpoints.

    python -m examples.quickstart.make_backbones --tokenizer outputs/quickstart/tokenizer \\
        --output outputs/quickstart/backbones

Writes <output>/siglip (SiglipVisionModel and its preprocessor_config.json) and <output>/mistral
(MistralForCausalLM and the tokenizer), the two folders that conversion takes, just as it takes the
published large ones.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from examples.quickstart.language_backbone import pretrain_language
from examples.quickstart.scenes import PLACE_NAMES
from examples.quickstart.vision_backbone import pretrain_vision, save_vision
from megatron_dattn.errors import EXIT_USER_ERROR, DataError, UserError


def make_backbones(
    tokenizer_folder: Path,
    output: Path,
    grid: int = 2,
    seed: int = 0,
    vision_steps: int | None = None,
    language_steps: int | None = None,
) -> None:
    """Pretrain both models and save them; None means the default number of steps."""
    if not (tokenizer_folder / "tokenizer.json").is_file():
        raise DataError(f"{tokenizer_folder} holds no tokenizer.json; run make_tokenizer first")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    vision_options = {} if vision_steps is None else {"num_steps": vision_steps}
    save_vision(pretrain_vision(grid=grid, seed=seed, **vision_options), output / "siglip")
    language_options = {} if language_steps is None else {"num_steps": language_steps}
    model = pretrain_language(tokenizer, grid=grid, seed=seed, **language_options)
    model.save_pretrained(output / "mistral")
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, output / "mistral" / file.name)


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="made by make_tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--grid", type=int, default=2, choices=sorted(PLACE_NAMES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
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

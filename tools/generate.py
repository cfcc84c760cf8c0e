"""Answer questions about images from a run's newest checkpoint.

    python tools/generate.py --checkpoint runs/stage3 --image cat.jpg --question "What is this?"

Without --image the question is text only; --image may be given several times, and --video, a file
or a folder of frames, which come behind the images. So may --question: every question is asked
about all images, which are encoded once, and its answer stands under it.
--alpha adds a table of how much an answer attended to the images: alpha_V by layer and head. Where
there is none (no image, an empty answer, a preset that reads images apart) the reason stands there.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dattn.data.templates import TEMPLATE_NAMES
from megatron_dattn.errors import ConfigError, DataError
from megatron_dattn.runtime.log import setup_logging, silence_import_warnings
from megatron_dattn.runtime.tool import ToolParser, run_tool

if TYPE_CHECKING:
    from megatron_dattn.inference import LoadedModel, Prompt


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a run")
    parser.add_argument("--image", type=Path, action="append", default=[], help="image file")
    parser.add_argument(
        "--video", type=Path, action="append", default=[], help="video file, or folder of frames"
    )
    parser.add_argument("--question", action="append", help="what to ask (default: nothing)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument(
        "--template",
        choices=TEMPLATE_NAMES,
        help="conversation template; the run's own by default (plain captions)",
    )
    parser.add_argument("--alpha", action="store_true", help="print attention to images")
    return parser.parse_args(arguments)


def alpha_table(loaded: "LoadedModel", prompt: "Prompt", answer: list[int]) -> list[str]:
    """Lines of text: what an answer's tokens gave to the images, or why there is no such table."""
    from megatron_dattn.inference import attention_maps

    try:
        return attention_maps(loaded, prompt, answer).table()
    except DataError as error:
        return [f"no alpha_V: {error}"]


def answer(arguments: argparse.Namespace) -> int:
    setup_logging(stream=sys.stderr)
    silence_import_warnings()
    # Imported late: --help should not wait for torch and megatron-core.
    from megatron_dattn.inference import Prompt, decode, generate_tokens, load_model
    from megatron_dattn.inference.prompt import video_of
    from megatron_dattn.runtime.distributed import destroy_distributed

    try:
        if arguments.max_new_tokens < 1:
            raise ConfigError(
                f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}"
            )
        loaded = load_model(arguments.checkpoint, template=arguments.template)
        questions = arguments.question or [""]
        shown = [*arguments.image, *map(video_of, arguments.video)]
        prompts = [Prompt.from_question(loaded, ask, shown) for ask in questions]
        tokens = generate_tokens(loaded, prompts, max_new_tokens=arguments.max_new_tokens)
        lines = []
        for asked, prompt, said in zip(questions, prompts, tokens, strict=True):
            lines += [f"> {asked}"] if len(questions) > 1 else []
            lines += decode(loaded, [said])
            if arguments.alpha:
                lines += ["", *alpha_table(loaded, prompt, said)]
    finally:
        destroy_distributed()
    print("\n".join(lines))
    return 0


def main(given: list[str] | None = None) -> int:
    arguments = parse_arguments(given)
    return run_tool(lambda: answer(arguments))


if __name__ == "__main__":
    sys.exit(main())

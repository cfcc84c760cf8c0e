"""What a kept image saves: questions from its pixels against questions from its keys and values.

    python -m benchmarks.bench_image_cache --output benchmarks/image_cache_cpu.md
    python -m benchmarks.bench_image_cache --model model/ --run runs/stage3

Measures an exported model (--model) and the engine's own generator (--run, a run folder); without
either both, with random weights of --hidden-size and --layers. Questions are random tokens. Before
anything is timed, every question is answered both ways: the answers must be equal. The first logits
are compared too, those of the engine with the forward pass of training.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.protocol import DEFAULT_ROUNDS, Timings, time_rounds, timer_of
from megatron_dattn.runtime.log import silence_import_warnings

silence_import_warnings()  # before megatron-core is imported

from benchmarks.image_questions import (  # noqa: E402
    ExportedModel,
    Generator,
    OwnGenerator,
    Questions,
    random_export,
    random_loaded,
    sizes,
)
from megatron_dattn.hf.modeling_dattn import DAttnForConditionalGeneration  # noqa: E402
from megatron_dattn.inference import load_model  # noqa: E402
from megatron_dattn.runtime.distributed import (  # noqa: E402
    initialize_distributed,
    seed_everything,
)
from megatron_dattn.runtime.tool import ToolParser  # noqa: E402

_WARM_UP = 1
_PIXELS, _KEPT, _ENCODING = "pixels", "kept", "encoding"
_ALL_PIXELS, _ALL_KEPT = "all from pixels", "all from kept"


def cache_report(arguments: argparse.Namespace) -> str:
    """Check and measure everything; the whole Markdown file."""
    questions = Questions(
        arguments.questions, arguments.images, arguments.text_tokens, arguments.answer_tokens
    )
    device = report.choose_device(arguments.device)
    notes, checks, rows = [], [], []
    for generator in generators(arguments, questions, device):
        checks.append(check(generator, questions))
        timings = measure(generator, questions, device, arguments)
        rows.append(time_row(generator, timings))
        notes.append(
            f"{generator.description}; "
            + report.rounds_note(timings.num_rounds, arguments.rounds, _WARM_UP)
        )
    if not (arguments.model or arguments.run):
        notes.append(f"random weights, {arguments.layers} layers {arguments.hidden_size} wide")
    notes.append(
        f"{questions.number} questions of {questions.text_tokens} tokens about "
        f"{questions.images} image(s), answers of {questions.answer_tokens} tokens"
    )
    head = report.header("Keeping an image", arguments.command, device, notes)
    times = report.table(
        [
            "generator",
            "encoding, ms, once",
            "first token from pixels, ms",
            "first token from the kept image, ms",
            "pixels / kept",
            f"{questions.number} answers: pixels / (encoding + kept)",
            "noise floor",
        ],
        rows,
    )
    columns = ["generator", "equal answers", "difference of the first logits / largest logit"]
    return f"{head}\n\n{times}\n\n{report.table(columns, checks)}"


def generators(
    arguments: argparse.Namespace, questions: Questions, device: torch.device
) -> Iterator[Generator]:
    """Those to measure, one after the other, so that only one is in memory."""
    random = not (arguments.model or arguments.run)
    torch.manual_seed(0)
    if arguments.model or random:
        if random:
            model: Any = random_export(sizes(arguments.hidden_size, arguments.layers))
        else:
            model = DAttnForConditionalGeneration.from_pretrained(arguments.model).eval()
        yield ExportedModel(model.to(device), questions)
    if arguments.run or random:
        if random:
            initialize_distributed()
            seed_everything(0)
            loaded = random_loaded(sizes(arguments.hidden_size, arguments.layers))
        else:
            loaded = load_model(arguments.run)
        yield OwnGenerator(loaded, questions)


def check(generator: Generator, questions: Questions) -> list[str]:
    """A row about agreement.

    Raises:
        AssertionError: an answer differs.
    """
    kept, largest = generator.encode(), 0.0
    for number in range(questions.number):
        expected = generator.answer(number, questions.answer_tokens)
        answer = generator.answer(number, questions.answer_tokens, kept)
        assert answer == expected, f"the kept image changed an answer of the {generator.name}"
        logits = generator.logits(number)
        difference = (generator.logits(number, kept) - logits).abs().max() / logits.abs().max()
        largest = max(largest, difference.item())
    return [generator.name, f"{questions.number} of {questions.number}", f"{largest:.1e}"]


def measure(
    generator: Generator, questions: Questions, device: torch.device, arguments: argparse.Namespace
) -> Timings:
    """One question's first token both ways, the encoding, and all answers both ways."""
    kept = generator.encode()

    def all_answers(kept: Any = None) -> None:
        for number in range(questions.number):
            generator.answer(number, questions.answer_tokens, kept)

    return time_rounds(
        {
            _PIXELS: lambda: generator.answer(0, 1),
            _KEPT: lambda: generator.answer(0, 1, kept),
            _ENCODING: generator.encode,
            _ALL_PIXELS: all_answers,
            _ALL_KEPT: lambda: all_answers(generator.encode()),
        },
        rounds=arguments.rounds,
        timer=timer_of(device),
        warm_up=_WARM_UP,
        budget_seconds=arguments.seconds,
    )


def time_row(generator: Generator, timings: Timings) -> list[str]:
    """A row of the table of times."""
    milliseconds = (
        report.spread(timings.milliseconds(name), digits=1) for name in (_ENCODING, _PIXELS, _KEPT)
    )
    ratios = (timings.ratio(_PIXELS, _KEPT), timings.ratio(_ALL_PIXELS, _ALL_KEPT), timings.noise)
    return [generator.name, *milliseconds, *(report.spread(ratio) for ratio in ratios)]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `command` is what to type to repeat it."""
    parser = ToolParser(__doc__, prog="python -m benchmarks.bench_image_cache")
    parser.add_argument("--model", type=Path, help="folder of an export")
    parser.add_argument("--run", type=Path, help="folder of a run")
    parser.add_argument("--hidden-size", type=int, default=512, help="of random weights")
    parser.add_argument("--layers", type=int, default=8, help="of random weights")
    parser.add_argument("--images", type=int, default=1, help="images of every question")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--text-tokens", type=int, default=32, help="length of a question")
    parser.add_argument("--answer-tokens", type=int, default=16, help="length of an answer")
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS)
    parser.add_argument("--seconds", type=float, help="per generator: no new round after so long")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path, help="Markdown file; printed in any case")
    parsed = parser.parse_args(arguments)
    parsed.command = f"{parser.prog} {shlex.join(arguments)}"
    return parsed


def main(arguments: list[str] | None = None) -> int:
    return report.run(cache_report, parse(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())

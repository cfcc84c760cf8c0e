"""Greedy generation, timed: the engine's generator and the exported model against stock LLaVA.

    python -m benchmarks.bench_generation --threads 2 --output benchmarks/generation_cpu.md

Stock is LlavaForConditionalGeneration, which is S-Attn. All models have the same sizes and random
weights; every question has images of its own. In every round each variant answers all questions
once, in one batch, the order reversed every other round. Times are the process's CPU time, which
other work on the machine changes least. A step's time is the median over an answer's tokens after
the first; what counts is the median over rounds of the ratio to stock's in the same round.
"""

import argparse
import dataclasses
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.protocol import Spread
from megatron_dattn.errors import UserError
from megatron_dattn.runtime.log import silence_import_warnings

silence_import_warnings()  # before megatron-core is imported

from benchmarks.image_questions import (  # noqa: E402
    IMAGE_TOKEN,
    Questions,
    random_export,
    random_llava,
    random_loaded,
    sizes,
)
from megatron_dattn.batch import IGNORED_LABEL  # noqa: E402
from megatron_dattn.data.images import ImagePreprocessor  # noqa: E402
from megatron_dattn.data.template import TextTokens  # noqa: E402
from megatron_dattn.inference import LoadedModel, Prompt, encode_images  # noqa: E402
from megatron_dattn.inference.decoding import Decoding  # noqa: E402
from megatron_dattn.models.config import ModelConfig  # noqa: E402
from megatron_dattn.runtime.distributed import (  # noqa: E402
    initialize_distributed,
    seed_everything,
)
from megatron_dattn.runtime.tool import ToolParser  # noqa: E402

_WARM_UP = 1
_STOCK = "stock LLaVA"
Answer = Callable[[], list[float]]
"""Answers all questions; gives the moments at its start and after each token."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Of one answer to all questions, seconds."""

    first: float
    """To the first token of all questions."""
    step: float
    """Of each further token of all questions, the median."""

    @staticmethod
    def of(answer: Answer) -> "Times":
        start, first, *others = answer()
        steps = [after - before for before, after in zip((first, *others), others, strict=False)]
        return Times(first - start, statistics.median(steps))


def variants(model: ModelConfig, questions: Questions) -> dict[str, Answer]:
    """The programs that answer the questions, by name; stock first."""
    stock = random_llava(model)
    export = random_export(dataclasses.replace(model, attention="dattn"))
    pixels = _pixels(model, questions)
    kept = export.encode_images(pixels)
    made = {
        _STOCK: _hugging_face(stock, questions, model.tokens_per_image, pixel_values=pixels),
        "exported dattn": _hugging_face(export, questions, 1, pixel_values=pixels),
        "exported dattn, images kept": _hugging_face(export, questions, 1, image_cache=kept),
    }
    for preset in ("s_attn", "dattn"):
        loaded = random_loaded(dataclasses.replace(model, attention=preset))
        pictures = questions.pictures(model.vision.image_size)
        made[f"engine {preset}"] = _engine(loaded, questions, pictures)
        if preset == "dattn":
            encoded = encode_images(loaded, pictures)
            made[f"engine {preset}, images kept"] = _engine(loaded, questions, encoded)
    return made


def generation_report(arguments: argparse.Namespace) -> str:
    """Measure everything; the whole Markdown file."""
    report.choose_device("cpu")
    initialize_distributed()
    seed_everything(0)
    model = sizes(arguments.hidden_size, arguments.layers)
    notes = [
        f"random weights, {arguments.layers} layers {arguments.hidden_size} wide, fp32; questions "
        f"of {arguments.text_tokens} tokens, answers of {arguments.answer_tokens} tokens",
    ]
    tables = []
    for number, images in _cases(arguments.cases):
        questions = Questions(
            number, number * images, arguments.text_tokens, arguments.answer_tokens
        )
        rounds = measure(variants(model, questions), arguments.rounds)
        visual = images * model.tokens_per_image
        title = f"{number} question(s) of {visual} visual tokens"
        notes.append(f"{title}: {report.rounds_note(arguments.rounds, arguments.rounds, _WARM_UP)}")
        tables.append(f"## {title}\n\n{time_table(rounds)}")
    head = report.header("Generation", arguments.command, torch.device("cpu"), notes)
    return "\n\n".join((head, *tables))


def measure(answers: dict[str, Answer], num_rounds: int) -> dict[str, list[Times]]:
    """The times of each variant in every round; stock's second run of a round stands under ""."""
    turns = [*answers.items(), ("", answers[_STOCK])]
    for _ in range(_WARM_UP):
        for answer in answers.values():
            answer()
    rounds: dict[str, list[Times]] = {name: [] for name, _ in turns}
    for number in range(num_rounds):
        for name, answer in turns if number % 2 == 0 else reversed(turns):
            rounds[name].append(Times.of(answer))
    return rounds


def time_table(rounds: dict[str, list[Times]]) -> str:
    """A row per variant; the last one is stock against itself, the noise floor."""
    rows = []
    for name, times in rounds.items():
        cells = [name or f"{_STOCK} again"]
        for figure in ("first", "step"):
            own = [getattr(each, figure) for each in times]
            stock = [getattr(each, figure) for each in rounds[_STOCK]]
            cells.append(report.spread(Spread.of([1000 * value for value in own]), digits=1))
            ratios = [a / b for a, b in zip(own, stock, strict=True)]
            cells.append(report.spread(Spread.of(ratios)))
        rows.append(cells)
    columns = ["variant", "first token, CPU ms", "/ stock", "further token, CPU ms", "/ stock"]
    return report.table(columns, rows)


def _pixels(model: ModelConfig, questions: Questions) -> torch.Tensor:
    pictures = questions.pictures(model.vision.image_size)
    return ImagePreprocessor(model.vision.image_size).normalise(pictures)


def _hugging_face(model: Any, questions: Questions, tokens_per_mark: int, **images: Any) -> Answer:
    """By `generate`; an image is marked by so many tokens."""
    texts = questions.tokens(model.config.text_config.vocab_size)
    marks = [IMAGE_TOKEN] * (tokens_per_mark * questions.images // questions.number)
    prompt = torch.tensor([marks + text for text in texts])

    def answer() -> list[float]:
        moments = [time.process_time()]

        def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            moments.append(time.process_time())
            return scores

        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=questions.answer_tokens,
            min_new_tokens=questions.answer_tokens,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=[IMAGE_TOKEN],
            logits_processor=[note],
            **images,
        )
        return moments

    return answer


def _engine(loaded: LoadedModel, questions: Questions, images: Any) -> Answer:
    """By what `generate_tokens` runs."""
    each = questions.images // questions.number
    texts = questions.tokens(loaded.model.model_config.language.vocab_size)
    prompts = [
        Prompt(
            TextTokens(ids, [IGNORED_LABEL] * len(ids), (0,) * each),
            tuple(images[number * each : (number + 1) * each]),
        )
        for number, ids in enumerate(texts)
    ]

    @torch.inference_mode()
    def answer() -> list[float]:
        moments = [time.process_time()]
        decoding = Decoding(loaded, prompts)
        logits = decoding.prefill()
        while True:
            logits[:, IMAGE_TOKEN] = -torch.inf
            tokens = logits.argmax(dim=-1).tolist()
            moments.append(time.process_time())
            if len(moments) > questions.answer_tokens:
                return moments
            logits = decoding.decode_step(range(len(prompts)), tokens)

    return answer


def _cases(texts: list[str]) -> Iterator[tuple[int, int]]:
    for text in texts:
        number, _, images = text.partition("x")
        if not (number.isdecimal() and images.isdecimal() and int(number) and int(images)):
            raise UserError(f"--cases {text}: write questions x images of each, such as 8x1")
        yield int(number), int(images)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `command` is what to type to repeat it."""
    parser = ToolParser(__doc__, prog="python -m benchmarks.bench_generation")
    parser.add_argument("--cases", nargs="+", default=["1x4", "8x1"], help="questions x images")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--text-tokens", type=int, default=32, help="length of a question")
    parser.add_argument("--answer-tokens", type=int, default=32, help="length of an answer")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="Markdown file; printed in any case")
    parsed = parser.parse_args(arguments)
    parsed.command = f"{parser.prog} {shlex.join(arguments)}"
    return parsed


def main(arguments: list[str] | None = None) -> int:
    return report.run(generation_report, parse(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())

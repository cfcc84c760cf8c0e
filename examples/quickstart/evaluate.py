"""Ask the held-out questions, print the accuracy table, draw sample images with the answers.

    python -m examples.quickstart.evaluate --checkpoint runs/demo/stage3 --data runs/demo/data \\
        --output runs/demo

Writes accuracy.json, answers.json and samples.png into the output folder.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image
from tqdm import tqdm

from examples.quickstart.questions import (
    CategoryScore,
    Question,
    format_table,
    is_correct,
    load_questions,
    overall,
    score,
)
from megatron_dattn.errors import EXIT_USER_ERROR, UserError
from megatron_dattn.runtime.log import setup_logging, silence_import_warnings

silence_import_warnings()

from megatron_dattn.inference import LoadedModel, Prompt, generate, load_model  # noqa: E402
from megatron_dattn.runtime.distributed import destroy_distributed  # noqa: E402
from megatron_dattn.runtime.tool import ToolParser  # noqa: E402

MAX_NEW_TOKENS = 24
NUM_SAMPLES = 12


def batches(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), size):
        yield questions[start : start + size]


def answer_all(
    loaded: LoadedModel, questions: Sequence[Question], data: Path, batch_size: int
) -> dict[str, str]:
    """Question id -> generated answer."""
    answers: dict[str, str] = {}
    bar = tqdm(total=len(questions), desc="questions", disable=None)
    for batch in batches(questions, batch_size):
        prompts = [Prompt.from_question(loaded, q.question, [data / q.image]) for q in batch]
        generated = generate(loaded, prompts, max_new_tokens=MAX_NEW_TOKENS)
        answers |= {q.id: answer for q, answer in zip(batch, generated, strict=True)}
        bar.update(len(batch))
    bar.close()
    return answers


def pick_samples(questions: Sequence[Question]) -> list[Question]:
    """The first questions of each category in turn."""
    by_category: dict[str, list[Question]] = {}
    for question in questions:
        by_category.setdefault(question.category, []).append(question)
    rounds = zip(*by_category.values(), strict=False)
    return [question for one_each in rounds for question in one_each][:NUM_SAMPLES]


def draw_samples(
    questions: Sequence[Question], answers: dict[str, str], data: Path, target: Path
) -> None:
    """Images with question and answer below; a wrong answer shows the expected one too."""
    columns = 4
    rows = -(-len(questions) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(3.0 * columns, 3.3 * rows), squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for panel, question in zip(panels.flat, questions, strict=False):
        answer = answers[question.id]
        correct = is_correct(answer, question.answer)
        note = answer if correct else f"{answer}  (expected: {question.answer})"
        panel.imshow(Image.open(data / question.image))
        panel.set_title(f"{question.question}\n{note}", fontsize=8, color="k" if correct else "r")
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    plt.close(figure)


def write_accuracy(scores: dict[str, CategoryScore], target: Path) -> None:
    """All numbers of the table as JSON."""
    table = {**scores, "all": overall(scores)}
    content = {
        name: {
            "correct": one.correct,
            "asked": one.total,
            "accuracy": one.accuracy,
            "without_looking": one.blind_accuracy,
        }
        for name, one in table.items()
    }
    target.write_text(json.dumps(content, indent=1) + "\n")


def evaluate(checkpoint: Path, data: Path, output: Path, batch_size: int) -> None:
    questions = load_questions(data / "heldout.json")
    loaded = load_model(checkpoint)
    answers = answer_all(loaded, questions, data, batch_size)
    scores = score(questions, answers)
    output.mkdir(parents=True, exist_ok=True)
    (output / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")
    write_accuracy(scores, output / "accuracy.json")
    draw_samples(pick_samples(questions), answers, data, output / "samples.png")
    attention = loaded.config.model.attention
    print(f"\nHeld-out accuracy, attention {attention}, {len(questions)} questions:\n")
    print(format_table(scores), flush=True)


def main() -> int:
    parser = ToolParser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a run")
    parser.add_argument("--data", type=Path, required=True, help="folder made by make_data")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    setup_logging()
    try:
        evaluate(options.checkpoint, options.data, options.output, options.batch_size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    finally:
        destroy_distributed()
    return 0


if __name__ == "__main__":
    sys.exit(main())

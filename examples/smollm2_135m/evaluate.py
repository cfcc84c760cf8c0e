"""Score a trained run: easy-VQA's test questions, and what the language model kept of its own.

    python -m examples.smollm2_135m.evaluate --checkpoint seed1/everything \\
        --original seed1/adapter --data data --images packages/easy_vqa/data/test/images \\
        --output seed1

The original is the run's adapter stage, in which the language model is frozen: its answers to text
alone are those of the imported model, by the same program in the same precision. Writes scores.json
and answers.json into the output folder.
"""

import json
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from tqdm import tqdm

from examples.smollm2_135m.easy_vqa import TestQuestion
from examples.smollm2_135m.scores import agreement, by_type, choose
from megatron_dattn.errors import EXIT_USER_ERROR, UserError
from megatron_dattn.runtime.log import setup_logging, silence_import_warnings

silence_import_warnings()

from megatron_dattn.config.cli import load_config  # noqa: E402
from megatron_dattn.data.template import TextTokens  # noqa: E402
from megatron_dattn.inference import (  # noqa: E402
    LoadedModel,
    Prompt,
    generate,
    generate_tokens,
    load_model,
)
from megatron_dattn.inference.prompt import pack_prompts  # noqa: E402
from megatron_dattn.runtime.distributed import destroy_distributed  # noqa: E402
from megatron_dattn.runtime.tool import ToolParser  # noqa: E402

PROMPTS = Path(__file__).parent / "prompts.txt"
MAX_ANSWER_TOKENS = 8
MAX_TEXT_TOKENS = 32
# Of the reference manual that every Python carries: sections of prose, not of tables and grammars.
TOPICS = ("execmodel", "import", "types")
WINDOW_TOKENS = 512
NUM_WINDOWS = 8


def answer_questions(
    loaded: LoadedModel, questions: Sequence[TestQuestion], images: Path, batch_size: int
) -> dict[str, str]:
    """Question id -> generated answer."""
    answers: dict[str, str] = {}
    for start in tqdm(range(0, len(questions), batch_size), desc="questions", disable=None):
        batch = questions[start : start + batch_size]
        prompts = [Prompt.from_question(loaded, q.question, [images / q.image]) for q in batch]
        texts = generate(loaded, prompts, max_new_tokens=MAX_ANSWER_TOKENS)
        answers |= {question.id: text for question, text in zip(batch, texts, strict=True)}
    return answers


def answer_prompts(loaded: LoadedModel, prompts: Sequence[str], batch_size: int) -> list[list[int]]:
    """Greedy answers to text alone, as token ids."""
    answers: list[list[int]] = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="prompts", disable=None):
        batch = [Prompt.from_question(loaded, one) for one in prompts[start : start + batch_size]]
        answers += generate_tokens(loaded, batch, max_new_tokens=MAX_TEXT_TOKENS)
    return answers


def plain_text() -> str:
    """English that no stage of the training shows."""
    return "\n\n".join(topics.topics[name] for name in TOPICS)


@torch.inference_mode()
def perplexity(loaded: LoadedModel, text: str) -> float:
    """Of the text's first tokens, in windows that know nothing of each other."""
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    loss, count = 0.0, 0
    for start in range(0, NUM_WINDOWS * WINDOW_TOKENS, WINDOW_TOKENS):
        window = ids[start : start + WINDOW_TOKENS]
        prompt = Prompt(TextTokens(window, [], ()), ())
        batch = pack_prompts(loaded, [(prompt, [])])
        logits = loaded.model.forward_logits(batch, torch.arange(len(window) - 1))
        loss += torch.nn.functional.cross_entropy(
            logits.float(), torch.tensor(window[1:]), reduction="sum"
        ).item()
        count += len(window) - 1
    return math.exp(loss / count)


def text_scores(loaded: LoadedModel, batch_size: int) -> tuple[float, list[list[int]]]:
    """Perplexity, and answers to text alone."""
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    return perplexity(loaded, plain_text()), answer_prompts(loaded, prompts, batch_size)


def evaluate(options: Any) -> dict[str, Any]:
    """All scores of a run, as they are written to scores.json."""
    rows = json.loads((options.data / "test.json").read_text(encoding="utf-8"))
    questions = choose([TestQuestion(**row) for row in rows], options.questions, options.seed)
    before, original = text_scores(
        load_model(options.original, template="model"), options.batch_size
    )
    destroy_distributed()  # each model makes its process groups
    loaded = load_model(options.checkpoint)
    after, now = text_scores(loaded, options.batch_size)
    answers = answer_questions(loaded, questions, options.images, options.batch_size)
    (options.output / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")
    return {
        "attention": loaded.config.model.attention,
        "precision": loaded.config.execution.precision,
        "steps": {
            "adapter": load_steps(options.original),
            "everything": loaded.config.training.train_iters,
        },
        "questions": {"asked": len(questions), "of": len(rows), "seed": options.seed},
        "accuracy": {name: asdict(one) for name, one in by_type(questions, answers).items()},
        "text": f"Python {platform.python_version()}, pydoc_data.topics: {', '.join(TOPICS)}",
        "perplexity": {"before": before, "after": after},
        "agreement": asdict(agreement(original, now)),
    }


def load_steps(folder: Path) -> int:
    """Steps of a finished stage, by its configuration."""
    return load_config(folder / "config.yaml").training.train_iters


def main() -> int:
    parser = ToolParser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the trained run")
    parser.add_argument("--original", type=Path, required=True, help="folder of its adapter stage")
    parser.add_argument("--data", type=Path, required=True, help="folder that easy_vqa.py wrote")
    parser.add_argument("--images", type=Path, required=True, help="test images of the package")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=1000, help="how many; 0: all 9673")
    parser.add_argument("--seed", type=int, default=0, help="which questions")
    parser.add_argument("--batch-size", type=int, default=50)
    options = parser.parse_args()
    setup_logging()
    try:
        scores = evaluate(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    finally:
        destroy_distributed()
    # Last: it says that the evaluation is whole.
    (options.output / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Ask an exported model held-out questions with transformers alone, as its users would.

    python examples/quickstart/ask.py --model runs/demo/model --data runs/demo/data

This process imports nothing of the training stack: whoever has torch and transformers can run it.
With --answers, the file that `evaluate` wrote, an answer that differs from the training stack's is
an error (exit status 1): the export would not be the model that was trained.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

MAX_NEW_TOKENS = 24
EXIT_DIFFERENT = 1


def ask(model: Any, processor: Any, image: Path, question: str) -> str:
    """The greedy answer to one question about one image."""
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
    answer = tokens[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(answer, skip_special_tokens=True)[0].strip()


def pick(questions: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """Evenly spread over the file, which goes through the categories and the images."""
    return questions[:: max(1, len(questions) // count)][:count]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of an export")
    parser.add_argument("--data", type=Path, required=True, help="folder made by make_data")
    parser.add_argument("--answers", type=Path, help="the training stack's, to compare with")
    parser.add_argument("--count", type=int, default=12, help="how many questions")
    options = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(options.model, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    expected = json.loads(options.answers.read_text()) if options.answers else {}
    different = 0
    questions = pick(json.loads((options.data / "heldout.json").read_text()), options.count)
    for one in questions:
        answer = ask(model, processor, options.data / one["image"], one["question"])
        print(f"    {one['question']}  {answer}", flush=True)
        if answer != expected.get(one["id"], answer):
            different += 1
            print(f"        the training stack answered: {expected[one['id']]}")
    assert not any(name.startswith("megatron") for name in sys.modules), "this must not need us"
    if different:
        print(
            f"error: {different} of {len(questions)} answers differ from the training stack's",
            file=sys.stderr,
        )
        return EXIT_DIFFERENT
    return 0


if __name__ == "__main__":
    sys.exit(main())

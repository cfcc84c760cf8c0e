"""Run in a process of its own: load exports as any user would, and ask them.

    python answer.py QUESTIONS.json ANSWERS.pt EXPORT...

Nothing of this project can be imported here.
"""

import json
import sys
from importlib.abc import MetaPathFinder


class _Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "megatron_dattn"):
            raise ModuleNotFoundError(f"{name} is not installed here")


sys.meta_path.insert(0, _Absent())

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)


def answers_of(folder, conversations):
    remote = {"trust_remote_code": True}
    assert AutoConfig.from_pretrained(folder, **remote).model_type == "dattn"
    assert type(AutoModel.from_pretrained(folder, **remote)).__name__ == "DAttnModel"
    model = AutoModelForImageTextToText.from_pretrained(folder, **remote)
    processor = AutoProcessor.from_pretrained(folder, **remote)
    answers = []
    for conversation in conversations:
        inputs = processor.apply_chat_template(
            [conversation], tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            logits = model(**inputs).logits[0]
        tokens = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        answers.append({"ids": inputs["input_ids"][0], "logits": logits, "tokens": tokens})
    return answers


def main():
    questions, output, *folders = sys.argv[1:]
    with open(questions) as file:
        conversations = json.load(file)
    torch.save([answers_of(folder, conversations) for folder in folders], output)


main()

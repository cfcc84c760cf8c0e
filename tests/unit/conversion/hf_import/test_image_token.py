"""A tokenizer that reserves nothing: `<image>` behind the vocabulary, from import to re-import.

The language model is tied and has 64 entries, all taken, which tensor parallelism pads with none.
Its own chat template is ChatML with a default system prompt, as SmolLM2's.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.conversion.io.safetensors_reader import SafetensorsFolder
from megatron_dattn.hf.modeling_dattn import DAttnForConditionalGeneration
from megatron_dattn.hf.processing_dattn import DAttnProcessor
from megatron_dattn.inference import Prompt, generate_tokens, load_model
from megatron_dattn.inference.load import find_run
from megatron_dattn.runtime.distributed import destroy_distributed
from tests.functional.workspace import pretrain
from tests.unit.conversion.hf_models import (
    SPECIAL_TOKENS,
    save_language,
    save_tokenizer,
    save_vision,
)
from tests.unit.data.builders import make_records
from tools.convert_checkpoint import main
from tools.prepare_data import main as prepare

pytestmark = pytest.mark.usefixtures("own_modules")

SPECIAL = [*SPECIAL_TOKENS[:3], "<|im_start|>", "<|im_end|>"]
WORDS = [f"<{index}>" for index in range(28)]  # and 31 letters and signs
IMAGE_ID = 64
CHATML = """\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}\
{{ '<|im_start|>system\nyou help<|im_end|>\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# LLaVA's adapter has no norm.
RUNS: dict[str, list[str]] = {
    "dattn": ["--attention", "dattn"],
    "s_attn": ["--attention", "s_attn", "--model.adapter.norm", "none"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of encoder and language model, prepared data, and an import."""
    base = tmp_path_factory.mktemp("behind")
    save_vision(base / "vision")
    save_language(base / "language", family="llama", tie_word_embeddings=True, varied=True)
    save_tokenizer(base / "language", [*SPECIAL, *WORDS])
    (base / "language" / "chat_template.jinja").write_text(CHATML)
    rows = base / "rows.json"
    rows.write_text(json.dumps(make_records(base / "prepared", 24)))
    return base


def train(base: Path, name: str, ranks: int) -> None:
    """Four steps, or what is left of them."""
    line = "--train-iters 4 --save-interval 2 --micro-batch-size 2 --global-batch-size 4"
    line += " --precision fp32 --num-workers 0 --visual-budget 48 --text-budget 512"
    line += f" --tensor-model-parallel-size {max(1, ranks)}"
    files = ["--config", str(base / "import" / "config.yaml")]
    files += ["--config", str(base / "prepared" / "train.yaml")]
    folders = ["--save", str(base / name), "--stage", name, "--load", str(base / "import")]
    done = pretrain([*files, *line.split(), *RUNS[name], *folders], ranks=ranks)
    assert done.returncode == 0, done.stderr


def test_image_lies_behind_the_vocabulary(base: Path, capsys: Any) -> None:
    inputs = ["--vision", base / "vision", "--language", base / "language"]
    command = ["import", *inputs, "--output", base / "import", "--dtype", "fp32"]
    assert main([str(part) for part in command]) == 0
    said = capsys.readouterr().out
    assert f"<image> has id {IMAGE_ID}, behind the vocabulary of 64: it is never embedded" in said
    assert "written as model: the chat template that came with its tokenizer" in said
    assert main(["verify", str(base / "import")]) == 0
    arguments = [str(base / "rows.json"), "--image-root", str(base / "prepared")]
    assert prepare([*arguments, "--output", str(base / "prepared")]) == 0


@pytest.mark.parametrize("preset", RUNS)
def test_training_goes_on_and_exports_come_back(base: Path, preset: str, capsys: Any) -> None:
    train(base, preset, 0)
    shutil.rmtree(base / preset / "step-0000004")
    train(base, preset, 2)
    run, export, again = base / preset, base / f"{preset}-hf", base / f"{preset}-again"
    assert main(["export", "--checkpoint", str(run), "--output", str(export)]) == 0
    assert main(["verify", str(run), "--against", str(export)]) == 0
    rows = SafetensorsFolder(export).shapes["model.language_model.embed_tokens.weight"][0]
    assert rows == {"dattn": 64, "s_attn": 65}[preset]
    assert main(["import", "--model", str(export), "--output", str(again), "--dtype", "fp32"]) == 0
    assert main(["verify", str(again)]) == 0
    before, after = (open_tensors(find_run(folder)[0].path) for folder in (run, again))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name].load(), after[name].load()), name
    assert find_run(again)[1].model.language == find_run(run)[1].model.language
    assert main(["export", "--checkpoint", str(again), "--output", str(base / "twice")]) == 0
    for path in sorted(export.iterdir()):
        if path.suffix != ".md":
            assert path.read_bytes() == (base / "twice" / path.name).read_bytes(), path.name
    (base / "twice").rename(base / f"{preset}-twice")


def test_a_reader_may_count_every_token_of_the_prompt(base: Path) -> None:
    """transformers looks up the logits of the prompt's tokens, `<image>` among them."""
    Image.new("RGB", (30, 20), "red").save(base / "red.png")
    loaded = load_model(base / "dattn")
    prompt = Prompt.from_question(loaded, "what is it?", [base / "red.png"])
    (expected,) = generate_tokens(loaded, [prompt], max_new_tokens=8)
    destroy_distributed()
    model = DAttnForConditionalGeneration.from_pretrained(base / "dattn-hf").eval()
    processor = DAttnProcessor.from_pretrained(base / "dattn-hf")
    image = {"type": "image", "path": str(base / "red.png")}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "what is it?"}]},
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == IMAGE_ID).sum() == 1
    for more in ({}, {"repetition_penalty": 1.0 + 1e-9}, {"no_repeat_ngram_size": 9}):
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, **more)
        assert tokens[0, inputs["input_ids"].shape[1] :].tolist() == expected

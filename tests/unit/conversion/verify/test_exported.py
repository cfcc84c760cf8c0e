"""`verify --against` agrees with an export, and notices one that is not the run's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_dattn.conversion.hf_export.run import export_checkpoint
from megatron_dattn.conversion.verify.exported import verify_export
from megatron_dattn.inference.decoding import Decoding
from tests.support.passes import Passes
from tests.support.run_folders import make_run_folder
from tests.unit.conversion.hf_models import save_language, save_vision
from tools.convert_checkpoint import main

pytestmark = pytest.mark.usefixtures("own_modules")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs and exports of a model with code of its own and of a LLaVA, and two pictures."""
    base = tmp_path_factory.mktemp("verify")
    save_vision(base / "vision")
    save_language(base / "language")
    make_run_folder(base, base / "dattn", "dattn")
    make_run_folder(base, base / "llava", "s_attn", norm="none")
    for name in ("dattn", "llava"):
        export_checkpoint(base / name, base / f"{name}-hf")
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / f"{number}.png")
    return base


def verify(base: Path, run: str, exported: Path | str, *more: str) -> int:
    return main(["verify", str(base / run), "--against", str(base / exported), *more])


COMPARED = [
    *(f"logits of a random text with {images}" for images in ("no image", "one image", "3 images")),
    "answer to a prompt with no image",
    *(f"answer to a prompt with the image {where}" for where in ("first", "in the middle", "last")),
    "answer to a prompt with images first and last",
    "answer to a prompt with the image alone",
]


@pytest.mark.parametrize("name", ["dattn", "llava"])
def test_random_texts_and_answers_with_images_in_every_place_agree(base, name, capsys):
    assert verify(base, name, f"{name}-hf") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == COMPARED
    assert all(line.endswith(f"over {48 * 64} values: agree") for line in lines[:3])
    assert all(line.endswith(": agree") for line in lines)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_llava_of_another_family_agrees(tmp_path, family, capsys):
    save_vision(tmp_path / "vision", family="clip")
    sizes = {"tie_word_embeddings": True, "vocab_size": 67}
    save_language(tmp_path / "language", family=family, varied=True, **sizes)
    make_run_folder(tmp_path, tmp_path / "run", "s_attn", norm="none")
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    assert verify(tmp_path, "run", "hf") == 0
    assert capsys.readouterr().out.count(": agree") == len(COMPARED)


def test_answers_from_another_column_are_noticed(base, monkeypatch, capsys):
    """As of a reader that begins an answer one column too early."""

    def shifted(self):
        return torch.tensor([max(end - 2, 0) for end in self._layout.text_cu_seqlens[1:]])

    monkeypatch.setattr(Decoding, "_last_text_tokens", shifted)
    assert verify(base, "dattn", "dattn-hf") == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(line.endswith(": agree") for line in lines[:3])
    assert all(line.endswith("DIFFER by more than 0.0001") for line in lines[3:])


@pytest.mark.parametrize("images", [[], ["0.png"], ["0.png", "1.png"]])
@pytest.mark.parametrize("name", ["dattn", "llava"])
def test_a_question_about_files_agrees(base, name, images, capsys):
    files = ["--image", *(str(base / image) for image in images)] if images else []
    assert verify(base, name, f"{name}-hf", "--question", "what is this?", *files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["logits", "answer"]
    assert all(line.endswith(": agree") for line in lines)


@pytest.mark.parametrize(
    ("name", "weight", "differing"),
    [
        ("dattn", "model.language_model.layers.0.mlp.up_proj.weight", 9),
        ("dattn", "model.vision_tower.encoder.layers.0.mlp.fc1.weight", 7),  # where images are
        ("llava", "model.multi_modal_projector.linear_2.weight", 7),
    ],
)
def test_one_changed_tensor_is_noticed(base, tmp_path, name, weight, differing, capsys):
    changed = Path(shutil.copytree(base / f"{name}-hf", tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors[weight] *= 1.5
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert verify(base, name, changed) == 1
    assert capsys.readouterr().out.count("DIFFER by more than 0.0001") == differing


def test_what_does_not_fit_is_one_line(base, tmp_path, capsys):
    other = Path(shutil.copytree(base / "dattn-hf", tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["vocab_size"] = 80
    (other / "config.json").write_text(json.dumps(config))
    for run, exported, more, message in (
        ("dattn", "llava-hf", [], 'of type "llava", the run\'s export is of type "dattn"'),
        ("dattn", "vision/nothing", [], "there is no folder"),
        ("dattn", other, [], "vocab_size: the checkpoint has 64, the folder 80"),
        ("nothing", "dattn-hf", [], "holds no config.yaml"),
        ("dattn", "dattn-hf", ["--tokens", "3"], "no --vision, --language, --model, --tokens"),
        ("dattn", "dattn-hf", ["--image", "x.png"], "give one"),
        ("dattn", "dattn-hf", ["--question", "what?", "--image", "x.png"], "x.png"),
    ):
        assert verify(base, run, exported, *more) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
    assert main(["verify", str(base / "dattn"), "--question", "what?"]) == 2
    assert "are for --against" in capsys.readouterr().err


def test_one_checkpoint_s_folder_is_compared_and_tells_how_far_it_is(base, caplog):
    caplog.set_level("INFO")
    passes, folder = Passes(), base / "dattn" / "step-0000001"
    compared = verify_export(folder, base / "dattn-hf", progress=passes)
    assert all(each.agrees() and each.exact is None for each in compared)
    passes.check("checking step-0000001", "reading the checkpoint")
    assert "1 of 2: logits and answers of" in caplog.text
    assert f"2 of 2: logits and answers of {folder}" in caplog.text


def test_bf16_agrees_coarsely(base, capsys):
    assert verify(base, "dattn", "dattn-hf", "--dtype", "bf16") == 0
    assert capsys.readouterr().out.count(": agree") == len(COMPARED)

"""The commands of README and of the 7B recipe work as they are typed, on tiny stand-ins.

Models and data stand where the recipe's table of downloads puts them. Every command of the tools is
run, and each stage reads all of its data with the recipe's own files.
"""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dattn.checkpoint import find_checkpoint
from megatron_dattn.config.cli import load_config, parse_command_line
from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.training.stream import loader_of_rank
from tests.unit.conversion.hf_models import save_language, save_vision
from tests.unit.data.builders import record, save_image
from tools import convert_checkpoint, prepare_data

ROOT = Path(__file__).resolve().parents[2]
README, RECIPE = ROOT / "README.md", ROOT / "examples" / "mistral_7b" / "README.md"
DATA_PAGE, STAGES = ROOT / "docs" / "data.md", "### The paper's three stages"
TOOLS: dict[str, Callable[[list[str]], int]] = {
    "tools/convert_checkpoint.py": convert_checkpoint.main,
    "tools/prepare_data.py": prepare_data.main,
}
# File, where its images count from, and some of them.
DATA = [
    (
        "data/llava/llava_pretrain/blip_laion_cc_sbu_558k.json",
        "data/llava/llava_pretrain/images",
        ["00453/004539375.png", "00223/002239345.png"],
    ),
    (
        "data/sharegpt4v/share-captioner_coco_lcs_sam_1246k_1107.json",
        "data",
        ["coco/train2017/1.png", "sam/images/sa_2.png", "llava/llava_pretrain/images/3.png"],
    ),
    (
        "data/llava/llava_v1_5_mix665k.json",
        "data",
        ["coco/train2017/1.png", "gqa/images/2.png", "ocr_vqa/images/3.png", "vg/VG_100K/4.png"],
    ),
    (
        "data/sharegpt4v/sharegpt4v_instruct_gpt4-vision_cap100k.json",
        "data",
        ["share_textvqa/images/1.png", "web-celebrity/images/2.png", "wikiart/images/3.png"],
    ),
]


def commands(document: Path, heading: str = "") -> list[list[str]]:
    """The single commands of a document's code blocks, indented or fenced, behind a heading."""
    text = document.read_text().replace("\\\n", " ")
    if heading:
        text = text.partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^(?:    )?((?:python|torchrun) .+)$", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def run_tools(document: Path, heading: str = "") -> int:
    """Run the commands that make folders; returns their number."""
    makers = [words for words in commands(document, heading) if words[1] in TOOLS]
    for words in makers:
        assert TOOLS[words[1]](words[2:]) == 0, words
    return len(makers)


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with all that the recipe tells to download."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    save_vision(tmp_path / "models" / "siglip")
    save_language(tmp_path / "models" / "mistral")
    for file, image_root, names in DATA:
        for index, name in enumerate(names):
            save_image(tmp_path / image_root / name, seed=index)
        records = [record("<image>\nwhat is it ?", f"number {name}", name) for name in names]
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(json.dumps(records))
    return tmp_path


def samples_of(stage: str, *more: str) -> list[str]:
    """Keys of all samples that a stage reads, with the recipe's files and the import's model."""
    files = ["examples/mistral_7b/model.yaml", f"examples/mistral_7b/{stage}.yaml", *more]
    recipe = load_config(*files)
    imported = load_config("checkpoints/mistral_7b/import/config.yaml")
    config = replace(recipe, model=imported.model)
    loader = loader_of_rank(config, recipe.data.train, 0, 1, training=False)
    return sorted(key.rpartition("-")[0] for batch in loader for key in batch.sample_keys)


def expected_of(*files: int) -> list[str]:
    return sorted(Path(DATA[file][0]).stem for file in files for _ in DATA[file][2])


def test_the_commands_of_readme(downloads: Path) -> None:
    assert run_tools(README) == 2
    assert samples_of("stage1") == expected_of(0)
    (train,) = [words for words in commands(README) if words[0] == "torchrun"]
    config = parse_command_line(train[train.index("pretrain_vlm.py") + 1 :]).config
    assert config == load_config(
        "examples/mistral_7b/model.yaml", "examples/mistral_7b/stage1.yaml"
    )
    assert config.checkpoint.load is not None
    assert find_checkpoint(config.checkpoint.load) is not None


def test_the_commands_of_the_recipe(downloads: Path) -> None:
    (downloads / "baseline").mkdir()
    assert run_tools(RECIPE) == 5
    assert samples_of("stage1") == expected_of(0)
    assert samples_of("stage2") == expected_of(1)
    assert samples_of("stage3") == expected_of(2, 3)
    baseline = load_config("baseline/checkpoints/mistral_7b/import/config.yaml")
    assert baseline.model.attention == "s_attn"


def test_the_commands_for_shards(downloads: Path) -> None:
    """With one image that is not there, as of SAM's many people have a part."""
    assert run_tools(RECIPE) == 5
    (downloads / "data" / "sam" / "images" / "sa_2.png").unlink()
    assert run_tools(DATA_PAGE, STAGES) == 3
    for stage, files in (("stage1", [0]), ("stage2", [1]), ("stage3", [2, 3])):
        expected = expected_of(*files)
        if stage == "stage2":
            expected.pop()
        assert samples_of(stage, f"data/shards/{stage}/train.yaml") == expected
    (train,) = [words for words in commands(DATA_PAGE, STAGES) if words[0] == "torchrun"]
    config = parse_command_line(train[train.index("pretrain_vlm.py") + 1 :]).config
    name = "blip_laion_cc_sbu_558k"
    assert config.data.train == [DatasetConfig(str(downloads / "data/shards/stage1" / name))]

"""The demo's plan: training commands parse and chain; seeds and presets share what they can."""

from pathlib import Path
from typing import Any

import pytest

from examples.quickstart.demo import Step
from examples.smollm2_135m.demo import STAGES, Demo, plan
from megatron_dattn.config.cli import parse_command_line
from megatron_dattn.config.pretrain import PretrainConfig


def _demo(output: Path, **changed: Any) -> Demo:
    settings = {"attention": "s_attn", "seed": 3, "precision": "bf16", "questions": 10}
    return Demo(output, **{**settings, **changed})


def _configs(demo: Demo) -> list[PretrainConfig]:
    """What the training commands say, beside what the steps before them write."""
    demo.folder.joinpath("base").mkdir(parents=True, exist_ok=True)
    (demo.folder / "base" / "config.yaml").write_text("model: {attention: s_attn}\n")
    for stage in STAGES:
        for section in ("train", "validation"):
            folder = demo.shared / "data" / "prepared" / stage / section
            folder.mkdir(parents=True, exist_ok=True)
            text = f"data: {{{section}: [{{path: {stage}.jsonl}}]}}\n"
            (folder / f"{section}.yaml").write_text(text)
    steps = [step.command for step in plan(demo) if "pretrain_vlm.py" in step.command]
    flags = [words[words.index("pretrain_vlm.py") + 1 :] for words in steps]
    return [parse_command_line(words).config for words in flags]


def _step(demo: Demo, word: str) -> Step:
    (found,) = [step for step in plan(demo) if word in step.command]
    return found


def test_training_commands_parse_and_chain(tmp_path: Path) -> None:
    demo = _demo(tmp_path)
    previous = demo.folder / "base"
    for stage, config in zip(STAGES, _configs(demo), strict=True):
        assert config.model.attention == "s_attn"
        assert config.execution.precision == "bf16"
        assert config.training.seed == 3
        assert config.data.train[0].path == config.data.validation[0].path == f"{stage}.jsonl"
        assert config.checkpoint.load == str(previous)
        previous = demo.folder / stage
        assert config.checkpoint.save == str(previous)


def test_first_the_adapter_learns_then_everything(tmp_path: Path) -> None:
    adapter, everything = (config.optimizer.learning_rates for config in _configs(_demo(tmp_path)))
    assert (adapter.vision_model, adapter.language_model) == (0.0, 0.0)
    assert adapter.adapter > 0
    assert 0 < everything.language_model < everything.adapter
    assert everything.vision_model > 0


def test_steps_can_be_fewer(tmp_path: Path) -> None:
    demo = _demo(tmp_path, steps=(30, 2, 4))
    assert [config.training.train_iters for config in _configs(demo)] == [2, 4]
    vision = _step(demo, "examples.smollm2_135m.vision_backbone").command
    assert vision[vision.index("--steps") + 1] == "30"


@pytest.mark.parametrize("changed", [{"seed": 4}, {"attention": "dattn_sum"}])
def test_seeds_and_presets_share_packages_data_and_encoder(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    here, other = plan(_demo(tmp_path)), plan(_demo(tmp_path, **changed))
    shared = [one == two for one, two in zip(here, other, strict=True)]
    # Import, two stages and the evaluation are a run's own; the table is everybody's.
    assert shared == [True] * (len(shared) - 5) + [False] * 4 + [True]


def test_test_images_are_for_the_evaluation_alone(tmp_path: Path) -> None:
    demo = _demo(tmp_path)
    reading = [step for step in plan(demo) if str(demo.images("test")) in step.command]
    assert reading == [_step(demo, "examples.smollm2_135m.evaluate")]

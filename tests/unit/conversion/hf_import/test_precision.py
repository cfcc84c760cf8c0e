"""An import's precision is that of what is made of it, unless a later setting says otherwise."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from megatron_dattn.config.cli import load_config, parse_command_line
from megatron_dattn.conversion.hf_export.run import export_checkpoint
from megatron_dattn.conversion.hf_import.plan import plan_whole_import
from megatron_dattn.conversion.hf_import.run import write_import
from megatron_dattn.inference import Prompt, generate_tokens, load_model
from megatron_dattn.runtime.distributed import destroy_distributed
from tests.unit.conversion.llava_models import save_llava

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model's folder, and its imports by their dtype."""
    base = tmp_path_factory.mktemp("precision")
    save_llava(base / "hf")
    for dtype in DTYPES:
        plan = plan_whole_import(base / "hf", base / dtype, dtype=dtype)
        assert plan.summary().splitlines()[-1].startswith(f"generates and trains in {dtype}")
        write_import(plan)
    return base


@pytest.fixture(autouse=True)
def _no_groups_are_left():
    yield
    destroy_distributed()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_generates_in_it(imported, dtype, caplog):
    loaded = load_model(imported / dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {DTYPES[dtype]}
    assert generate_tokens(loaded, [Prompt.from_question(loaded, "why?")], max_new_tokens=2)
    assert "are rounded" not in caplog.text


def test_a_run_folder_that_does_not_say_it_warns(imported, tmp_path, caplog):
    """As imports from before have it: FP32 weights, and BF16 by default."""
    settings = yaml.safe_load((imported / "fp32" / "config.yaml").read_text())
    del settings["execution"]
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("tokenizer", "step-0000000", "latest.json"):
        (folder / name).symlink_to(imported / "fp32" / name)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    loaded = load_model(folder)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert "are rounded to bf16" in caplog.text


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stage_trains_in_it_unless_told_otherwise(imported, tmp_path, dtype):
    base, other = imported / dtype / "config.yaml", "bf16" if dtype == "fp32" else "fp32"
    stage, silent = tmp_path / "stage.yaml", tmp_path / "silent.yaml"
    stage.write_text(f"execution: {{precision: {other}}}")
    silent.write_text("training: {train_iters: 3}")
    assert load_config(base, silent).execution.precision == dtype
    assert load_config(base, stage).execution.precision == other
    flag = ["--config", str(base), "--execution.precision", other]
    assert parse_command_line(flag).config.execution.precision == other


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_export_has_it(imported, tmp_path, dtype):
    export_checkpoint(imported / dtype, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(DTYPES[dtype]).removeprefix("torch.")

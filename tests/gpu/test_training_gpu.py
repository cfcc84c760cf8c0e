"""The training step on a CUDA device: NCCL, BF16, the flash backend, Transformer Engine.

Run on a GPU machine with `pytest -m gpu tests/gpu`. One process; the layouts over several ranks are
compared on CPUs (tests/distributed).
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dattn.checkpoint.files import step_folder_name
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.runtime.cpu import cpu_runtime_active
from megatron_dattn.runtime.distributed import destroy_distributed
from megatron_dattn.runtime.engine_imports import fp8_failure, te_failure
from tests.functional.workspace import make_workspace, pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 4
# BF16 keeps 8 bits of each product's factors; sums are fp32. On a CPU the losses of these steps
# then agree to 6e-4; a wrong gradient or mask shows by more.
BF16_TOLERANCE = 5e-3


def losses(config: PretrainConfig | None = None, **settings: Any) -> list[float]:
    """Losses of a few steps of a tiny model on this device."""
    from megatron_dattn.training.step import train_step
    from tests.support.training import build_run, training_config
    from tests.support.vlm import make_batch

    config = config or training_config(num_packs=2, train_iters=STEPS, **settings)
    budgets = config.data.visual_budget, config.data.text_budget
    options: dict[str, Any] = {"budgets": budgets, "grid": config.model.image_grid}
    images = ((), (0,), (2, 5))
    packs = [make_batch([9 + i % 3], [images[i % 3]], seed=i, **options) for i in range(2 * STEPS)]
    run = build_run(config, packs)
    try:
        reports = [train_step(run) for _ in range(STEPS)]
    finally:
        destroy_distributed()
    assert not any(report.skipped for report in reports)
    return [report.loss for report in reports]


def test_bf16_with_the_flash_backend_follows_fp32() -> None:
    exact = losses()
    assert not cpu_runtime_active()
    fast = losses(precision="bf16", attention_backend="auto", transformer_impl="local")
    assert fast == pytest.approx(exact, rel=BF16_TOLERANCE)
    assert fast[-1] < fast[0]


@pytest.mark.parametrize("attention", ["dattn", "s_attn"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(attention: str, recompute: str) -> None:
    settings = {"precision": "bf16", "attention_backend": "auto", "attention": attention}
    plain = losses(**settings)
    assert losses(**settings, recompute=recompute) == pytest.approx(plain, rel=1e-3)


@pytest.mark.skipif(te_failure() is not None, reason=f"Transformer Engine: {te_failure()}")
def test_transformer_engine_follows_local_modules() -> None:
    local = losses(precision="bf16", transformer_impl="local")
    engine = losses(precision="bf16", transformer_impl="transformer_engine")
    assert engine == pytest.approx(local, rel=BF16_TOLERANCE)


@pytest.mark.skipif(te_failure() is not None, reason=f"Transformer Engine: {te_failure()}")
@pytest.mark.parametrize("attention", ["dattn", "s_attn"])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_fp8_follows_bf16(recipe: str, attention: str) -> None:
    from tests.support.training import fp8_training_config

    failure = fp8_failure(recipe)
    if failure:
        pytest.skip(failure)
    settings = {"precision": "bf16", "num_packs": 2, "train_iters": STEPS}
    settings |= {"attention_backend": "auto", "transformer_impl": "transformer_engine"}
    plain = losses(fp8_training_config(1, attention, **settings))
    fp8 = fp8_training_config(1, attention, **settings, fp8="hybrid", fp8_recipe=recipe)
    # With factors rounded to E4M3 on a CPU they were half a percent apart.
    assert losses(fp8) == pytest.approx(plain, rel=2e-2)


def test_the_entry_script_trains_saves_and_resumes(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, precision="bf16")
    first = pretrain(workspace.flags(), ranks=1)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "iteration 8/8" in first.stdout
    assert "CUDA is available: the CPU runtime stays off" in first.stdout
    shutil.rmtree(tmp_path / "run" / step_folder_name(8))  # else nothing is left to do
    again = pretrain(workspace.flags(), ranks=1)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed from" in again.stdout
    assert "iteration 7/8" in again.stdout

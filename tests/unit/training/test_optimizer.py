"""Groups, rates, decay and schedule of the optimizer, and its refusal of other rates on resume."""

import math
from typing import Any

import pytest

from megatron_dattn.config.training import ModuleLearningRates, OptimizerConfig
from megatron_dattn.errors import ConfigError
from megatron_dattn.training.optimizer import num_warmup_steps
from tests.support.distributed import run_distributed
from tests.support.stand_in import run_with


@pytest.mark.parametrize(
    ("ratio", "iters", "steps"),
    [(0.0, 10, 0), (0.03, 100, 3), (0.03, 101, 4), (0.5, 1, 0), (1.0, 10, 9)],
)
def test_warmup_steps(ratio: float, iters: int, steps: int) -> None:
    assert num_warmup_steps(OptimizerConfig(warmup_ratio=ratio), iters) == steps


def _groups_and_schedule() -> tuple:
    from megatron_dattn.training.optimizer import current_learning_rates, parameter_groups
    from tests.support.training import ALL_RATES, build_run, training_config

    config = training_config(train_iters=10, warmup_ratio=0.2, min_lr_ratio=0.1, weight_decay=0.3)
    run = build_run(config, [])
    optimizer, scheduler = run.state.optimizer, run.state.scheduler
    groups = parameter_groups(optimizer)
    rates = []
    for _ in range(11):
        rates.append(current_learning_rates(optimizer))
        scheduler.step(increment=1)
    sizes = {
        (module, decays): sum(
            p.numel()
            for name, p in run.state.model.named_parameters()
            if f"{module}." in name and (p.dim() > 1 and not name.endswith("bias")) == decays
        )
        for module in ("vision_model", "adapter", "language_model")
        for decays in (True, False)
    }
    return ALL_RATES, groups, sizes, rates


@pytest.fixture(scope="module")
def groups_and_schedule() -> tuple:
    (answer,) = run_distributed(_groups_and_schedule, 1)
    return answer


def test_every_module_has_its_rate_and_norms_do_not_decay(groups_and_schedule: tuple) -> None:
    peaks, groups, sizes, _ = groups_and_schedule
    found = {(g.module, g.weight_decay > 0): g for g in groups}
    assert len(found) == len(groups)
    for (module, decays), size in sizes.items():
        if size == 0:
            continue
        group = found.pop((module, decays))
        assert group.num_parameters == size
        assert group.weight_decay == (0.3 if decays else 0.0)
    assert not found
    assert peaks.adapter != peaks.language_model != peaks.vision_model


def test_cosine_with_warmup_of_every_module(groups_and_schedule: tuple) -> None:
    peaks, _, _, rates = groups_and_schedule
    for module, peak in vars(peaks).items():
        for step in range(11):
            if step <= 2:
                expected = peak * step / 2
            else:
                cosine = 0.5 * (1 + math.cos(math.pi * (step - 2) / 8))
                expected = peak * (0.1 + 0.9 * cosine)
            assert rates[step][module] == pytest.approx(expected, rel=1e-12), (module, step)


def _groups_after_load(rates_of_second: ModuleLearningRates) -> list[tuple[str, float, int]]:
    """A state dict saved under the usual rates, loaded into an optimizer with others."""
    import copy

    from megatron_dattn.training.optimizer import parameter_groups, restore_optimizer
    from tests.support.training import build_run, leave, training_config

    saved = build_run(training_config(), []).state.optimizer
    saved_groups = [(g.module, g.learning_rate, g.num_parameters) for g in parameter_groups(saved)]
    state = copy.deepcopy(saved.state_dict())
    leave()
    config = training_config(rates=rates_of_second)
    optimizer = build_run(config, []).state.optimizer
    restore_optimizer(optimizer, state)
    loaded = [(g.module, g.learning_rate, g.num_parameters) for g in parameter_groups(optimizer)]
    assert loaded == saved_groups
    return loaded


def test_groups_do_not_collapse_on_load() -> None:
    """megatron-core 0.16 matches groups by lr_mult and flags only; equal ones would become one."""
    rates = ModuleLearningRates(vision_model=1e-3, adapter=2e-3, language_model=5e-4)
    (loaded,) = run_distributed(_groups_after_load, 1, rates)
    assert {module: rate for module, rate, _ in loaded} == vars(rates)


def _refused_rates() -> str:
    try:
        _groups_after_load(
            ModuleLearningRates(vision_model=1e-3, adapter=2e-3, language_model=7e-4)
        )
    except ConfigError as error:
        return str(error)
    return ""


def test_other_rates_are_refused_on_resume() -> None:
    (message,) = run_distributed(_refused_rates, 1)
    assert "optimizer.learning_rates.language_model" in message
    assert "0.0007" in message
    assert "0.0005" in message


def _adams_and_losses() -> dict[str, tuple[str, dict[str, Any], list[float]]]:
    from megatron_dattn.training.optimizer import single_optimizer
    from megatron_dattn.training.step import train_step
    from tests.support.training import build_run, leave, training_config
    from tests.support.vlm import make_batch

    found = {}
    for precision in ("fp32", "bf16"):
        packs = [make_batch([9, 7], [(1,), ()], seed=seed) for seed in range(3)]
        run = build_run(training_config(precision=precision, weight_decay=0.1), packs)
        losses = [train_step(run).loss for _ in packs]
        adam = single_optimizer(run.state.optimizer).optimizer
        found[precision] = type(adam).__module__, adam.defaults, losses
        leave()
    return found


@pytest.mark.parametrize(
    ("package", "module"),
    [("te", "transformer_engine.pytorch.optimizers"), ("apex", "apex.optimizers")],
)
def test_a_fused_adam_is_taken_where_there_is_one(package: str, module: str) -> None:
    (ours,) = run_distributed(_adams_and_losses, 1)
    (fused,) = run_with(package, _adams_and_losses, 1)
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 2e-2)):
        assert ours[precision][0] == "megatron_dattn.runtime.host_adam"
        assert fused[precision][0] == module
        assert fused[precision][1] == ours[precision][1]
        assert fused[precision][2] == pytest.approx(ours[precision][2], rel=tolerance)

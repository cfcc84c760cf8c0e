"""A resumed run with other settings: refused, or named and then told, applied and recorded."""

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_dattn.config.training import COMPARED_ON_RESUME, CheckpointConfig, ModuleLearningRates
from megatron_dattn.errors import CheckpointError, ConfigError, UserError
from megatron_dattn.training.resume_changes import compared_settings
from megatron_dattn.training.start_facts import settings_of
from tests.support.distributed import run_distributed
from tests.support.training import ALL_RATES, training_config

STEPS = 3
TOKENIZER = "0" * 64
FASTER = dataclasses.replace(ALL_RATES, adapter=4e-3)


def _resume(folder: str, kind: dict[str, Any], attempts: list[dict[str, Any]]) -> list[Any]:
    """Train and save some steps of 8; then resume with each of these settings.

    Returns:
        Per attempt the error, or what the resumed run is and said, and the next manifest's facts.
    """
    from megatron_dattn.training.run import make_checkpointer
    from megatron_dattn.training.step import train_step
    from tests.support.training import build_run, leave
    from tests.support.vlm import make_batch

    def start(settings: dict[str, Any]) -> tuple[Any, Any]:
        settings = {"train_iters": 8, "save": folder, **kind, **settings}
        packs = [make_batch([7, 5], [(2,)], seed=number) for number in range(40)]
        run = build_run(training_config(**settings), packs)
        return run, make_checkpointer(run.config, TOKENIZER)

    run, checkpointer = start({})
    for _ in range(STEPS):
        train_step(run)
    checkpointer.save(run.state)
    leave()
    return [_attempt(*start(settings), train_step, leave) for settings in attempts]


def _attempt(run: Any, checkpointer: Any, train_step: Any, leave: Any) -> Any:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_dattn").addHandler(handler)
    try:
        checkpointer.resume(run.state)
        groups = run.state.optimizer.param_groups
        before = [{k: g[k] for k in ("lr", "max_lr", "eps", "step", "lr_mult")} for g in groups]
        report = train_step(run)
        path = checkpointer.save(run.state)
        facts = json.loads((path / "manifest.json").read_text())["facts"]
        for file in path.iterdir():  # the next attempt resumes from the first checkpoint
            file.unlink()
        path.rmdir()
        return before, report.learning_rates, said, facts
    except UserError as error:
        return error
    finally:
        logging.getLogger("megatron_dattn").removeHandler(handler)
        leave()


def _cosine(step: int, last: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / last))


KINDS = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "distributed": {"precision": "bf16", "use_distributed_optimizer": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_named_changes(tmp_path: Path, kind: str) -> None:
    longer = {"train_iters": 16, "change_on_resume": ["training.train_iters"]}
    faster = {
        "rates": FASTER,
        "adam_eps": 1e-6,
        "num_packs": 2,
        "log_interval": 5,
        "change_on_resume": ["optimizer.learning_rates", "optimizer.adam_eps"],
    }
    faster["change_on_resume"] += ["training.global_batch_size"]
    ((made_longer, made_faster),) = run_distributed(
        _resume, 1, str(tmp_path), KINDS[kind], [longer, faster]
    )
    groups, rates, said, facts = made_longer
    for module, peak in dataclasses.asdict(ALL_RATES).items():
        assert rates[module] == pytest.approx(peak * _cosine(STEPS, 16))
    assert {group["step"] for group in groups} == {STEPS}, "the optimizer goes on counting"
    assert said[0] == f"changed after step {STEPS}: training.train_iters is 16, it was 8"
    assert f"0 steps of warm-up and ends at step 16; after step {STEPS} vision_model" in said[1]
    now, then = 2e-3 * _cosine(STEPS, 16), 2e-3 * _cosine(STEPS, 8)
    assert f"adapter goes on at {now:.3g} (peak 0.002), not at {then:.3g}" in said[1]
    assert facts["changes"] == [
        {"step": STEPS, "setting": "training.train_iters", "before": 8, "now": 16}
    ]
    assert facts["schedule"]["train_iters"] == facts["settings"]["training.train_iters"] == 16

    groups, rates, said, facts = made_faster
    assert rates["adapter"] == pytest.approx(4e-3 * _cosine(STEPS, 8))
    assert {group["eps"] for group in groups} == {1e-6}
    assert [change["setting"] for change in facts["changes"]] == [
        "logging.log_interval",
        "optimizer.adam_eps",
        "optimizer.learning_rates.adapter",
        "training.global_batch_size",
    ]
    assert sum(line.startswith("changed after step") for line in said) == 4


def test_what_is_not_named_is_refused_with_its_name(tmp_path: Path) -> None:
    frozen = dataclasses.replace(ALL_RATES, vision_model=0.0)
    attempts: list[dict[str, Any]] = [
        {"train_iters": 16},
        {"adam_beta2": 0.95},
        {"train_iters": 16, "rates": FASTER, "change_on_resume": ["training.train_iters"]},
        {"train_iters": 2, "change_on_resume": ["training.train_iters"]},
        {"rates": frozen, "change_on_resume": ["optimizer.learning_rates"]},
        {"change_on_resume": list(COMPARED_ON_RESUME)},
    ]
    ((*errors, unchanged),) = run_distributed(_resume, 1, str(tmp_path), {}, attempts)
    kinds = [CheckpointError, CheckpointError, CheckpointError, ConfigError, ConfigError]
    assert [type(error) for error in errors] == kinds
    long, beta, rates, short, ice = map(str, errors)
    assert "schedule.train_iters: this run has 16, the checkpoint 8" in long
    assert "--change-on-resume [training.train_iters]), or start a new stage" in long
    assert "--change-on-resume [optimizer.adam_beta2]), or give another" in beta
    assert "train_iters" not in rates
    assert "--change-on-resume [optimizer.learning_rates]), or" in rates
    assert "training.train_iters 2 lies before the checkpoint's step 3" in short
    assert "optimizer.learning_rates.vision_model is 0, but" in ice
    _, _, said, facts = unchanged
    assert (said, facts["changes"]) == ([], [])


def test_changes_stay_in_later_checkpoints(tmp_path: Path) -> None:
    """A second change is told beside the first, which is not told again."""
    from megatron_dattn.training.resume_changes import RunSettings

    settings = {**settings_of(training_config(log_interval=7)), "logging.of_tomorrow": 1}
    first = {"step": 1, "setting": "logging.log_interval", "before": 1, "now": 2}
    stored = {**settings, "logging.log_interval": 2, "logging.of_yesterday": 1}
    del stored["logging.of_tomorrow"]
    facts = {"settings": stored, "changes": [first]}
    found = _found(facts)
    run = RunSettings(**compared_settings(training_config()), settings=settings, named=[])
    run.adopt(None, {}, found)  # type: ignore[arg-type]
    run.tell(None)  # type: ignore[arg-type]
    second = {"step": 4, "setting": "logging.log_interval", "before": 2, "now": 7}
    assert run.facts()["changes"] == [first, second]
    facts["changes"] = [{"step": 1}]
    with pytest.raises(CheckpointError, match="changes are not understood"):
        run.adopt(None, {}, found)  # type: ignore[arg-type]


def _found(facts: dict[str, Any]) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(step=4, path="run/step-4", manifest=SimpleNamespace(facts=facts))


def test_a_checkpoint_that_tells_no_settings_changes_none() -> None:
    from megatron_dattn.training.resume_changes import RunSettings

    settings = settings_of(training_config())
    run = RunSettings(**compared_settings(training_config()), settings=settings, named=[])
    run.adopt(None, {}, _found({}))  # type: ignore[arg-type]
    run.tell(None)  # type: ignore[arg-type]
    assert run.facts()["changes"] == []


def test_names_that_no_resume_compares_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"names train_iters, which .* nearest is training\.train"
    ):
        CheckpointConfig(change_on_resume=["train_iters"])
    with pytest.raises(ConfigError, match=r"names model\.attention, which .*; leave it out"):
        CheckpointConfig(change_on_resume=["model.attention"])


def test_everything_compared_can_be_named() -> None:
    compared = compared_settings(training_config(rates=ModuleLearningRates()))
    names = {f"training.{name}" for name in compared["recipe"]["training"]}
    names |= {f"optimizer.{name}" for name in compared["recipe"]["optimizer"]}
    schedule = set(compared["schedule"])
    names |= {f"{'training' if n == 'train_iters' else 'optimizer'}.{n}" for n in schedule}
    assert names == set(COMPARED_ON_RESUME)

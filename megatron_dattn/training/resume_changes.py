"""Settings that differ where a run is resumed: which must be named, and what becomes of them.

A setting that shapes the weights to come (the schedule, the batch, Adam's constants) must be the
checkpoint's, or be named in `checkpoint.change_on_resume`. Others may differ freely. Either way the
log says what changed at which step, and so does every checkpoint from then on, in its manifest.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any

from megatron.core.dist_checkpointing.mapping import StateDict

from megatron_dattn.checkpoint.discovery import FoundCheckpoint
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.training import COMPARED_ON_RESUME
from megatron_dattn.errors import CheckpointError, ConfigError
from megatron_dattn.models.model_identity import Facts, differences, require_same
from megatron_dattn.runtime.distributed import is_rank_0
from megatron_dattn.training.optimizer import current_learning_rates, parameter_groups
from megatron_dattn.training.state import TrainState

logger = logging.getLogger(__name__)

# Of a run that is described elsewhere: its model is compared, its folders may move.
_NOT_TOLD = ("model.*", "checkpoint.save", "checkpoint.load", "checkpoint.change_on_resume")
_TAKEN_FROM_THE_RUN = ("max_lr", "min_lr", "betas", "eps")


def compared_settings(config: PretrainConfig) -> dict[str, Any]:
    """Values of what must be equal or named, by section: a checkpoint's `recipe` and `schedule`."""
    optimizer = asdict(config.optimizer)
    # What a resumed run must not change and nothing else compares (the loader's state compares what
    # shapes the samples): megatron-core would take the checkpoint's betas and eps without a word.
    fixed = ("adam_beta1", "adam_beta2", "adam_eps")
    # What the learning rates and the end of a stage follow from.
    scheduled = ("learning_rates", "min_lr_ratio", "warmup_ratio", "weight_decay")
    return {
        "recipe": {
            "training": {"global_batch_size": config.training.global_batch_size},
            "optimizer": {name: optimizer[name] for name in fixed},
        },
        "schedule": {
            "train_iters": config.training.train_iters,
            **{name: optimizer[name] for name in scheduled},
        },
    }


@dataclass(frozen=True)
class ChangedSetting:
    """A setting that was given another value, in the words of a checkpoint's manifest."""

    step: int
    """The last one that was trained with the former value."""
    setting: str
    before: Any
    now: Any


class RunSettings:
    """What a resume compares of a run's settings, and tells of those that changed.

    Args:
        recipe: plain data that must be equal or named: batch size, Adam's constants.
        schedule: what the learning rates follow from, likewise.
        settings: of the run, by full name; what changes is told and recorded.
        named: settings that may differ, of `COMPARED_ON_RESUME`.
    """

    def __init__(
        self, recipe: Facts, schedule: Facts, settings: Facts, named: Sequence[str]
    ) -> None:
        self._compared = {"recipe": dict(recipe), "schedule": dict(schedule)}
        told = {
            name: value
            for name, value in settings.items()
            if not any(fnmatch(name, pattern) for pattern in _NOT_TOLD)
        }
        self._settings: dict[str, Any] = json.loads(json.dumps(told))  # as a manifest has them
        self._named = tuple(named)
        self._changes: list[ChangedSetting] = []
        self._new: list[ChangedSetting] = []
        self._former_rates: dict[str, float] | None = None

    def facts(self) -> dict[str, Any]:
        """The facts of a checkpoint of this run."""
        changes = [asdict(change) for change in self._changes]
        return {**self._compared, "settings": self._settings, "changes": changes}

    def require_same_run(self, found: FoundCheckpoint, identity: Facts) -> None:
        """Refuse a checkpoint of another run, or of other settings than may differ. Local.

        Raises:
            CheckpointError: naming the settings that differ.
            ConfigError: a change was named that a running stage cannot make.
        """
        facts = found.manifest.facts
        ours = {**identity, **_without(self._compared, self._named)}
        stored = _without(facts, self._named)
        if not facts.get("schedule"):  # older checkpoints do not tell
            del ours["schedule"]
        schedule = {name: ours.pop(name) for name in ("schedule",) if name in ours}
        require_same(
            ours,
            stored,
            "resume",
            complaint=f"{found.path} belongs to another run",
            remedy=f"correct the configuration, {_naming(ours, stored)}or give another checkpoint "
            "folder",
        )
        require_same(
            schedule,
            stored,
            "resume",
            complaint=f"{found.path} was trained with another learning-rate schedule",
            remedy=f"resume with the same settings, {_naming(schedule, stored)}or start a new "
            "stage from its weights (checkpoint.load)",
        )
        self._check_named(found)

    def adopt(self, state: TrainState, loaded: StateDict, found: FoundCheckpoint) -> StateDict:
        """Put this run's schedule into what was loaded, where a change of it was named.

        megatron-core takes a checkpoint's groups as they were saved, and refuses another schedule.

        Raises:
            CheckpointError: what was loaded has no rates or no schedule, or what the checkpoint
                tells of former changes is not understood.
        """
        facts = found.manifest.facts
        stored = facts.get("settings") or {}
        self._changes = _former_changes(facts)
        self._new = [
            ChangedSetting(found.step, name, stored[name], self._settings[name])
            # Settings that only one has are those of another version.
            for name in sorted(stored.keys() & self._settings.keys())
            if stored[name] != self._settings[name]
        ]
        if self._named and differences(self._compared, facts, "resume"):
            self._former_rates = _adopt_schedule(state, loaded)
        return loaded

    def tell(self, state: TrainState) -> None:
        """Log what changed, and where the schedule ends now; record it in what is saved."""
        self._changes += self._new
        if not is_rank_0():
            return
        for change in self._new:
            words = (change.step, change.setting, change.now, change.before)
            logger.warning("changed after step %d: %s is %s, it was %s", *words)
        if self._former_rates is None:
            return
        peaks = {group.module: group.peak_rate for group in parameter_groups(state.optimizer)}
        logger.warning(
            "the schedule has %d steps of warm-up and ends at step %d; after step %d %s",
            state.scheduler.lr_warmup_steps,
            state.scheduler.lr_decay_steps,
            state.progress.step,
            ", ".join(
                f"{module} goes on at {rate:.3g} (peak {peaks[module]:.3g}), not at "
                f"{self._former_rates.get(module, rate):.3g}"
                for module, rate in current_learning_rates(state.optimizer).items()
            ),
        )

    def _check_named(self, found: FoundCheckpoint) -> None:
        """Refuse what neither optimizer nor schedule can follow."""
        schedule, former = self._compared["schedule"], found.manifest.facts.get("schedule") or {}
        if "training.train_iters" in self._named and schedule["train_iters"] < found.step:
            raise ConfigError(
                f"training.train_iters {schedule['train_iters']} lies before the checkpoint's step "
                f"{found.step}; give at least {found.step}"
            )
        if "optimizer.learning_rates" not in self._named:
            return
        for module, rate in schedule["learning_rates"].items():
            before = former.get("learning_rates", {}).get(module, rate)
            if (rate == 0) != (before == 0):
                raise ConfigError(
                    f"optimizer.learning_rates.{module} is {rate:g}, but {found.path} was trained "
                    f"with {before:g}: what is frozen has no optimizer state, so that cannot "
                    "change within a stage; start a new one from its weights (checkpoint.load)"
                )


def _adopt_schedule(state: TrainState, loaded: StateDict) -> dict[str, float]:
    """Returns the rate of each module in the step that would have come next."""
    own = {_group_key(group): group for group in state.optimizer.param_groups}
    shown = zip(state.optimizer.param_groups, parameter_groups(state.optimizer), strict=True)
    modules = {group["lr_mult"]: described.module for group, described in shown}
    former: dict[str, float] = {}
    try:
        groups = loaded["optimizer"].get("optimizer", loaded["optimizer"])["param_groups"]
        for group in groups:
            if _group_key(group) in own:
                former[modules[group["lr_mult"]]] = group["lr"]
                group.update({name: own[_group_key(group)][name] for name in _TAKEN_FROM_THE_RUN})
        steps = loaded["scheduler"]["num_steps"]
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint does not say at which rates it was trained ({type(error).__name__}: "
            f"{error}): resume with its own settings"
        ) from error
    loaded["scheduler"] = {**state.scheduler.state_dict(), "num_steps": steps}
    return former


def _group_key(group: Mapping[str, Any]) -> tuple[Any, Any]:
    return group["lr_mult"], group["wd_mult"]


def _former_changes(facts: Facts) -> list[ChangedSetting]:
    try:
        return [ChangedSetting(**change) for change in facts.get("changes", [])]
    except TypeError as error:
        raise CheckpointError(f"the checkpoint's changes are not understood: {error}") from error


def _place(setting: str) -> tuple[str, ...]:
    """Where a checkpoint's facts hold a setting of `COMPARED_ON_RESUME`."""
    section, _, name = setting.partition(".")
    is_recipe = name == "global_batch_size" or name.startswith("adam_")
    return ("recipe", section, name) if is_recipe else ("schedule", name)


def _without(facts: Facts, named: Sequence[str]) -> dict[str, Any]:
    """The facts without the values of the named settings."""
    left = dict(facts)
    for setting in named:
        *sections, name = _place(setting)
        inner = left
        for section in sections:
            inner[section] = dict(inner.get(section) or {})
            inner = inner[section]
        inner.pop(name, None)
    return left


def _naming(ours: Facts, stored: Facts) -> str:
    """How to name what differs, for the middle of a remedy; empty where it cannot be named."""
    facts = [f"{field.name}." for field in differences(ours, stored, "resume")]
    names = [
        setting
        for setting in COMPARED_ON_RESUME
        if any(fact.startswith(f"{'.'.join(_place(setting))}.") for fact in facts)
    ]
    if not names:
        return ""
    return f"name what is meant to change (--change-on-resume [{','.join(names)}]), "

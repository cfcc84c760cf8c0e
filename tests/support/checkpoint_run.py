"""A training run for tests of checkpoints: the product's model, step and optimizer, tiny packs.

Every step depends on the weights, the optimizer, the schedule and the loader's place, so a resumed
run equals an uninterrupted one only if all of them came back. `digests` shows the rest.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_dattn.config.training import CheckpointConfig, ModuleLearningRates
from megatron_dattn.runtime.random_states import capture_rng
from megatron_dattn.training.checkpoint import Checkpointer
from megatron_dattn.training.step import train_step
from tests.support.training import PackLoader, build_run, training_config
from tests.support.vlm import make_batch, tiny_model_config

TRAIN_ITERS = 20
PACKS_PER_STEP = 2
MODEL_FACTS = asdict(tiny_model_config())


@dataclass(frozen=True)
class Setup:
    """How one run is set up."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    bf16: bool = False
    distributed_optimizer: bool = False
    rates: tuple[float, float, float] = (1e-3, 2e-2, 5e-3)
    """Learning rates of vision_model, adapter, language_model; 0.0 freezes."""
    encoder_tp_mode: str = "data"
    with_loader: bool = True
    gates: bool = False
    """Whether the preset adds a gate to the decoder layers. A checkpointer's facts do not say so:
    what is missing must be noticed by itself."""
    implementation: str = "local"


class Run:
    """Model, optimizer, schedule and loader of this rank; lays out the ranks anew."""

    def __init__(self, setup: Setup, seed: int = 1234) -> None:
        self.setup = setup
        parallel_state.destroy_model_parallel()
        config = training_config(
            tensor=setup.tensor_parallel,
            pipeline=setup.pipeline_parallel,
            rates=ModuleLearningRates(*setup.rates),
            train_iters=TRAIN_ITERS,
            num_packs=PACKS_PER_STEP,
            attention="dattn_tanh" if setup.gates else "dattn",
            encoder_tp_mode=setup.encoder_tp_mode,
            precision="bf16" if setup.bf16 else "fp32",
            use_distributed_optimizer=setup.distributed_optimizer,
            transformer_impl=setup.implementation,
            seed=seed,
            weight_decay=0.1,
            warmup_ratio=0.1,
        )
        packs = [
            make_batch([7, 5], [(2,)], seed=number)
            for number in range(PACKS_PER_STEP * TRAIN_ITERS)
        ]
        self._run = build_run(config, packs)
        self.state = self._run.state
        self._loader: PackLoader | None = self.state.loader  # type: ignore[assignment]
        if not setup.with_loader:
            self.state.loader = None

    def train(self, steps: int) -> list[float]:
        """The loss of each step."""
        return [self._train_step() for _ in range(steps)]

    def _train_step(self) -> float:
        if self._loader is not None and not self.setup.with_loader:
            self._loader.go_to(self._run.num_microbatches * self.state.progress.step)
        report = train_step(self._run)
        assert not report.skipped
        return report.loss

    def checkpointer(self, folder: str | Path | None, **changes: Any) -> Checkpointer:
        keep_last = changes.pop("keep_last", 2)
        settings = {"model": MODEL_FACTS, "tokenizer": "0" * 64, "stage": "stage1"}
        config = CheckpointConfig(save=str(folder), keep_last=keep_last)
        return Checkpointer(config, **{**settings, **changes})

    def digests(self) -> dict[str, str]:
        """A sum over each part of the state that a checkpoint restores."""
        state = self.state
        optimizer = state.optimizer.chained_optimizers[0].optimizer
        moments = [
            tensor
            for group in optimizer.param_groups
            for param in group["params"]
            for tensor in (
                param,
                *(optimizer.state[param][k] for k in sorted(optimizer.state[param])),
            )
        ]
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        return {
            "weights": _digest(*state.model.state_dict().values()),
            "moments": _digest(*moments),
            "groups": repr(groups),
            "schedule": repr(state.scheduler.state_dict()),
            "random": hashlib.sha256(capture_rng()).hexdigest(),
            "progress": repr(asdict(state.progress)),
            "loader": "" if state.loader is None else state.loader.save_state().decode(),
        }


def changed_facts(**sections: Any) -> dict[str, Any]:
    """The model's description with other values: of `attention`, or of some fields of a section."""
    changed = dict(MODEL_FACTS)
    for name, change in sections.items():
        changed[name] = {**changed[name], **change} if isinstance(change, dict) else change
    return changed


def _digest(*tensors: Any) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            total.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()

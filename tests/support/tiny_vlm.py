"""A training run small enough for checkpoint tests, on megatron-core's real engine.

Three modules under the names that learning rates and checkpoints go by: two linear layers stand for
vision encoder and adapter, a GPTModel with dropout is the language model. Every step depends on the
weights, the optimizer, the schedule, the random states and the loader's place, so a resumed run
equals an uninterrupted one only if all of them came back.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dattn.checkpoint.rng import capture_rng
from megatron_dattn.config.training import (
    CheckpointConfig,
    ModuleLearningRates,
    OptimizerConfig,
)
from megatron_dattn.training.checkpoint import Checkpointer
from megatron_dattn.training.optimizer import build_optimizer, build_scheduler
from megatron_dattn.training.stages import freeze_modules
from megatron_dattn.training.state import TrainState
from tests.support.gpt import LocalRMSNorm
from tests.support.megatron import fill_parameters, init_model_parallel, tiny_transformer_config

VOCAB = 32
TOKENS = 8
FEATURES = 6
MICROBATCHES = 2
TRAIN_ITERS = 20
MODEL_FACTS = {"vision": {"size": FEATURES}, "adapter": {}, "language": {"vocab_size": VOCAB},
               "attention": "dattn"}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """How one run is set up."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    bf16: bool = False
    distributed_optimizer: bool = False
    rates: tuple[float, float, float] = (1e-3, 2e-2, 5e-3)
    """Learning rates of vision_model, adapter, language_model; 0.0 freezes."""
    dropout: float = 0.1
    with_loader: bool = True
    gates: bool = False
    """Whether the decoder layers have a gate, as an attention preset may add one."""


class TinyVLM(MegatronModule):
    """The model of one pipeline stage."""

    def __init__(self, config: TransformerConfig, gates: bool = False) -> None:
        super().__init__(config)
        self.pre_process = parallel_state.is_pipeline_first_stage()
        self.post_process = parallel_state.is_pipeline_last_stage()
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = LocalRMSNorm
        layer.submodules.pre_mlp_layernorm = LocalRMSNorm
        if self.pre_process:
            self.vision_model = torch.nn.Linear(FEATURES, 16)
            self.adapter = torch.nn.Linear(16, config.hidden_size)
        self.language_model = GPTModel(
            config,
            TransformerBlockSubmodules(
                [layer] * (config.num_layers // config.pipeline_model_parallel_size), LocalRMSNorm
            ),
            vocab_size=VOCAB,
            max_sequence_length=TOKENS,
            pre_process=self.pre_process,
            post_process=self.post_process,
            position_embedding_type="rope",
        )
        if gates:
            add_gates(self.language_model)

    def set_input_tensor(self, tensor: Any) -> None:
        self.language_model.set_input_tensor(tensor)

    def forward(self, tokens: torch.Tensor, pixels: torch.Tensor, labels: torch.Tensor) -> Any:
        positions = torch.arange(TOKENS)[None]
        hidden = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).triu(1)
        decoder_input = None
        if self.pre_process:
            seen = self.adapter(self.vision_model(pixels.to(self.adapter.weight.dtype)))
            decoder_input = self.language_model.embedding(tokens, positions) + seen[:, None]
        return self.language_model(
            tokens, positions, hidden, decoder_input=decoder_input, labels=labels
        )


def add_gates(language_model: GPTModel) -> None:
    """A learnable factor per head, zero at first, on whose mean the attention's output depends."""
    for layer in language_model.decoder.layers:
        attention = layer.self_attention
        attention.gate = torch.nn.Parameter(torch.zeros(4))
        attention.register_forward_hook(
            lambda module, _, output: (output[0] * (1 + module.gate.mean()), output[1])
        )


class CountingLoader:
    """Batches that depend on the number of batches before them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.place = 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.place += 1
            yield batch_of(1000 * self.seed + self.place)

    def save_state(self) -> bytes:
        return json.dumps({"seed": self.seed, "place": self.place}).encode()

    def restore_state(self, state: bytes) -> None:
        saved = json.loads(state)
        assert saved["seed"] == self.seed, "the state of another data-parallel rank"
        self.place = saved["place"]


def batch_of(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (1, TOKENS + 1), generator=generator)
    pixels = torch.randn(TOKENS, FEATURES, generator=generator)
    return tokens[:, :-1], pixels, tokens[:, 1:]


class Run:
    """Model, optimizer, schedule and loader of this rank; lays out the ranks anew."""

    def __init__(self, setup: Setup, seed: int = 1234) -> None:
        self.setup = setup
        parallel_state.destroy_model_parallel()
        init_model_parallel(setup.tensor_parallel, setup.pipeline_parallel, seed)
        self.config = tiny_transformer_config(
            hidden_dropout=setup.dropout,
            attention_dropout=setup.dropout,
            bf16=setup.bf16,
            params_dtype=torch.bfloat16 if setup.bf16 else torch.float32,
            calculate_per_token_loss=True,
        )
        self.state = self._build_state()

    def _build_state(self) -> TrainState:
        settings = OptimizerConfig(
            learning_rates=ModuleLearningRates(*self.setup.rates),
            weight_decay=0.1,
            warmup_ratio=0.1,
        )
        model = TinyVLM(self.config, self.setup.gates)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        fill_parameters(model, stage * self.config.num_layers // self.setup.pipeline_parallel)
        freeze_modules(model, settings.learning_rates)
        wrapped = DistributedDataParallel(
            self.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=self.setup.distributed_optimizer,
            ),
            Float16Module(self.config, model) if self.setup.bf16 else model,
        )
        optimizer = build_optimizer(
            settings,
            [wrapped],
            bf16=self.setup.bf16,
            use_distributed_optimizer=self.setup.distributed_optimizer,
        )
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = optimizer.scale_loss
        loader = None
        if self.setup.with_loader and parallel_state.get_tensor_model_parallel_rank() == 0:
            loader = CountingLoader(parallel_state.get_data_parallel_rank())
        return TrainState(
            [wrapped], optimizer, build_scheduler(settings, optimizer, TRAIN_ITERS), loader
        )

    def train(self, steps: int) -> list[float]:
        """Loss of each step on the last stage, 0.0 on the others."""
        return [self._train_step() for _ in range(steps)]

    def _train_step(self) -> float:
        state = self.state
        (model,) = state.model
        model.zero_grad_buffer()
        state.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=self._batches(),
            model=[model],
            num_microbatches=MICROBATCHES,
            seq_length=TOKENS,
            micro_batch_size=1,
            forward_only=False,
        )
        updated, _, _ = state.optimizer.step()
        assert updated
        state.scheduler.step(1)
        state.progress.step += 1
        state.progress.consumed_samples += MICROBATCHES
        return sum(float(loss["loss"]) for loss in losses)

    def _batches(self) -> Iterator[Any]:
        if self.state.loader is not None:
            return iter(self.state.loader)
        first = 10 * self.state.progress.step
        return iter([batch_of(first + i) for i in range(MICROBATCHES)])

    def checkpointer(self, folder: str | Path, **changes: Any) -> Checkpointer:
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
            "weights": digest(*state.model[0].state_dict().values()),
            "moments": digest(*moments),
            "groups": repr(groups),
            "schedule": repr(state.scheduler.state_dict()),
            "random": hashlib.sha256(capture_rng()).hexdigest(),
            "progress": repr(asdict(state.progress)),
            "loader": "" if state.loader is None else state.loader.save_state().decode(),
        }


def digest(*tensors: Any) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            total.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _forward_step(data_iterator: Iterator[Any], model: torch.nn.Module) -> tuple[Any, Any]:
    return model(*next(data_iterator)), _sum_loss


def _sum_loss(per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    total = per_token.float().sum()
    return total, torch.tensor(per_token.numel(), dtype=torch.int), {"loss": total.detach()}

"""Trains megatron-core's own GPTModel for a few steps through its whole engine.

Used to show that the CPU runtime carries the engine under every parallel layout. All layouts see
the same weights and the same global batch, so their losses and gradient norms must agree, with each
other and with the plain PyTorch loop of `train_plainly`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from tests.support.megatron import fill_parameters, init_model_parallel, tiny_transformer_config

VOCAB = 64
TOKENS = 16
GLOBAL_BATCH = 4
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.1

Steps = list[tuple[float, float]]  # loss per token and gradient norm of every step


class LocalRMSNorm(torch.nn.Module):
    """RMSNorm of the local spec that allows sequence parallelism (WrappedTorchNorm refuses it)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class Layout:
    """One way to run the same training."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False
    bf16: bool = False
    recompute: bool = False
    dropout: float = 0.0


@dataclass
class Engine:
    """A model in DDP and its optimizer, driven by megatron-core's schedules."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer

    def train_step(self, step: int) -> tuple[float, float]:
        """Loss per token over the global batch, the same on every rank, and the gradient norm."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=_own_samples(step),
            model=[self.model],
            num_microbatches=GLOBAL_BATCH // parallel_state.get_data_parallel_world_size(),
            seq_length=TOKENS,
            micro_batch_size=1,
            forward_only=False,
        )
        updated, gradient_norm, _ = self.optimizer.step()
        assert updated
        return _global_loss(losses), gradient_norm

    def sharded_state_dict(self, *, is_loading: bool = False) -> dict[str, Any]:
        """Model and optimizer as dist_checkpointing wants them, for any other layout."""
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        model = unwrap_model(self.model).sharded_state_dict(metadata=metadata)
        optimizer = self.optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=metadata
        )
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        unwrap_model(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def build_engine(layout: Layout) -> Engine:
    """The engine of this rank; model-parallel groups must exist."""
    config = _transformer_config(layout)
    model = build_gpt(config)
    overlap_param_gather = layout.overlap and layout.distributed_optimizer
    wrapped = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_grad_reduce=layout.overlap,
            overlap_param_gather=overlap_param_gather,
            bucket_size=4000 if layout.overlap else None,  # several buckets, or nothing overlaps
        ),
        Float16Module(config, model) if layout.bf16 else model,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            min_lr=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            clip_grad=1.0,
            bf16=layout.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=overlap_param_gather,
        ),
        [wrapped],
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if layout.overlap:
        config.no_sync_func = wrapped.no_sync
    if overlap_param_gather:
        config.param_sync_func = wrapped.start_param_sync
    return Engine(wrapped, optimizer)


def train(layout: Layout, steps: int) -> Steps:
    """Train on the ranks of `run_distributed`."""
    init_model_parallel(layout.tensor_parallel, layout.pipeline_parallel)
    engine = build_engine(layout)
    return [engine.train_step(step) for step in range(steps)]


def train_plainly(steps: int) -> Steps:
    """The same model and batches with autograd, torch's clipping and torch's AdamW alone."""
    init_model_parallel()
    model = build_gpt(_transformer_config(Layout()))
    parameters = list(model.parameters())
    # Without a scheduler megatron-core decays every parameter.
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, foreach=False
    )
    results = []
    for step in range(steps):
        optimizer.zero_grad()
        losses = torch.cat([_per_token_loss(model, *sample) for sample in _all_samples(step)])
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        results.append((losses.mean().item(), norm.item()))
    return results


def build_gpt(config: TransformerConfig) -> GPTModel:
    """This rank's stage of the model, with the weights of `fill_parameters`."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = LocalRMSNorm
    layer.submodules.pre_mlp_layernorm = LocalRMSNorm
    stage_layers = config.num_layers // config.pipeline_model_parallel_size
    model = GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[layer] * stage_layers, layer_norm=LocalRMSNorm
        ),
        vocab_size=VOCAB,
        max_sequence_length=TOKENS,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    fill_parameters(model, layer_offset=stage * stage_layers)
    return model


def _transformer_config(layout: Layout) -> TransformerConfig:
    recompute = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    return tiny_transformer_config(
        sequence_parallel=layout.sequence_parallel,
        bf16=layout.bf16,
        params_dtype=torch.bfloat16 if layout.bf16 else torch.float32,
        hidden_dropout=layout.dropout,
        calculate_per_token_loss=True,
        **(recompute if layout.recompute else {}),
    )


Sample = tuple[torch.Tensor, torch.Tensor]  # token ids and labels, [1, TOKENS] each


def _all_samples(step: int) -> list[Sample]:
    tokens = torch.randint(
        VOCAB, (GLOBAL_BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(step)
    )
    return [(token[None, :-1], token[None, 1:]) for token in tokens]


def _own_samples(step: int) -> Iterator[Sample]:
    size = parallel_state.get_data_parallel_world_size()
    share = GLOBAL_BATCH // size
    first = parallel_state.get_data_parallel_rank() * share
    return iter(_all_samples(step)[first : first + share])


def _per_token_loss(
    model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    positions = torch.arange(TOKENS)[None]
    hidden_keys = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return model(tokens, positions, hidden_keys, labels=labels)


def _forward_step(data_iterator: Iterator[Sample], model: torch.nn.Module) -> tuple[Any, Any]:
    return _per_token_loss(model, *next(data_iterator)), _sum_loss


def _sum_loss(per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    total = per_token.float().sum()
    count = torch.tensor(per_token.numel(), dtype=torch.int)
    return total, count, {"loss": (total.detach(), count)}


def _global_loss(losses: list[dict[str, Any]]) -> float:
    """Losses exist on the last stage only: give everybody their mean over all tokens."""
    sums = torch.zeros(2, dtype=torch.float64)
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        for loss in losses:
            sums += torch.stack(loss["loss"]).double()
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()

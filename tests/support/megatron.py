"""Tiny megatron-core configurations, and weights that do not depend on the parallel layout."""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dattn.runtime.distributed import initialize_distributed, seed_everything


def init_model_parallel(
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    context_parallel: int = 1,
    seed: int = 1234,
) -> None:
    """Model-parallel groups and random states on the ranks of `run_distributed`, or in-process."""
    initialize_distributed(
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        context_parallel_size=context_parallel,
        timeout_seconds=60,
    )
    seed_everything(seed)


def tiny_transformer_config(**overrides: Any) -> TransformerConfig:
    """A two-layer Mistral-like decoder (GQA, SwiGLU, RMSNorm) of the present parallel layout."""
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_dropout_fusion": False,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "pipeline_dtype": overrides.get("params_dtype", torch.float32),
    }
    return TransformerConfig(**{**settings, **overrides})


def global_parameters(
    model: torch.nn.Module, layer_offset: int
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters under the names they have without pipeline parallelism.

    `layer_offset` is the number of layers on the stages before this one.
    """
    for name, param in model.named_parameters():
        parts = name.split(".")
        if "layers" in parts:
            place = parts.index("layers") + 1
            parts[place] = str(int(parts[place]) + layer_offset)
        yield ".".join(parts), param


@torch.no_grad()
def fill_parameters(model: torch.nn.Module, layer_offset: int = 0, std: float = 0.05) -> None:
    """Give every parameter values that depend on its name and global shape only.

    So the same model has the same weights under every layout. Norm weights stay as they are. The
    first linear layer of a gated MLP holds [gate; up] on each tensor-parallel rank.
    """
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, param in global_parameters(model, layer_offset):
        if param.dim() == 1:
            continue
        axis = getattr(param, "partition_dim", -1)
        split = axis >= 0 and size > 1
        shape = [n * size if split and d == axis else n for d, n in enumerate(param.shape)]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        full = torch.randn(shape, generator=generator, dtype=torch.float64) * std
        if split and "linear_fc1" in name:
            gate_up = full.unflatten(axis, (2, -1)).chunk(size, axis + 1)[rank]
            full = gate_up.flatten(axis, axis + 1)
        elif split:
            full = full.chunk(size, axis)[rank]
        param.copy_(full)

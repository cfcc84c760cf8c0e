"""Builds this rank's share of the model after checking that the sizes can be cut that way."""

import contextlib
import dataclasses
import math

import torch

from megatron_dattn.errors import ConfigError
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.models.vlm import DAttnVLM
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.parallel.context.supported import check_preset


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    execution: ExecutionConfig,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    chunk: int | None = None,
    device: torch.device | str | None = None,
) -> DAttnVLM:
    """This pipeline stage's share of the model, randomly initialized.

    megatron-core's process groups and random states must be set up. On the CPU the weights do not
    depend on the tensor-parallel size; pipeline stages draw from their own random streams.

    Args:
        chunk: which of this rank's chunks, where `virtual_pipeline_model_parallel_size` makes
            several; `pre_process` and `post_process` are of the chunk then.
        device: where the parameters live; the CUDA device, or else the CPU, by default. On "meta"
            they have shapes but no memory and no values.

    Raises:
        ConfigError: sizes that cannot be cut over the ranks, or implementations that are missing.
    """
    check_model_sizes(model, parallel, execution)
    if device is not None and torch.device(device).type == "meta":
        # Transformer Engine would allocate; local modules have the same parameters.
        execution = dataclasses.replace(execution, transformer_impl="local", fp8="none")
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    with contextlib.nullcontext() if device is None else torch.device(device):
        return DAttnVLM(
            model,
            parallel,
            execution,
            pre_process=pre_process,
            post_process=post_process,
            chunk=chunk,
        )


def check_model_sizes(
    model: ModelConfig, parallel: ParallelConfig, execution: ExecutionConfig
) -> None:
    """Refuse a model that the parallel sizes cannot cut into equal shares, or whose attention they
    do not serve.

    Raises:
        ConfigError: naming the field, its value and the parallel size.
    """
    check_preset(model.attention, parallel.context_parallel_size)
    language, vision = model.language, model.vision
    parallel.layers_per_pipeline_stage(language.num_hidden_layers)
    tp = parallel.tensor_model_parallel_size
    if model.preset.visual.source == "reproject":
        middle = ("model.language.hidden_size", language.hidden_size)  # of each layer's projector
    else:
        middle = ("model.adapter.hidden_size", model.adapter.hidden_size or language.hidden_size)
    sizes = [
        ("language.num_attention_heads", language.num_attention_heads),
        ("language.num_key_value_heads", language.num_key_value_heads),
        ("model.language.vocab_size (padded)", language.padded_vocab_size),
        ("model.language.intermediate_size", language.intermediate_size),
        middle,
    ]
    encoder = [
        ("model.vision.num_attention_heads", vision.num_attention_heads),
        ("model.vision.intermediate_size", vision.intermediate_size),
    ]
    if execution.encoder_tp_mode == "weights":
        sizes += encoder
    for name, size in sizes:
        if size % tp:
            in_data = "execution.encoder_tp_mode 'data', which cuts no encoder, or "
            raise ConfigError(
                f"parallel.tensor_model_parallel_size {tp} does not divide {name} {size}; choose "
                f"{in_data if (name, size) in encoder else ''}"
                f"{_nearest_divisors(tp, math.gcd(*(size for _, size in sizes)))}, which divides "
                "all that is cut"
            )


def _nearest_divisors(size: int, number: int) -> str:
    """The largest divisor of a number below a size and the smallest above it, if there is one."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d < size], [d for d in divisors if d > size]
    return " or ".join(str(d) for d in (*below[-1:], *above[:1]))

"""How much text attends to images while training: alpha_V of every layer and head, now and then.

One step in `logging.alpha_interval` carries an observer; the others do nothing for it.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dattn.models.observer import AlphaMeter
from megatron_dattn.runtime.distributed import get_device
from megatron_dattn.training.run import Run


def meter_if_due(run: Run) -> AlphaMeter | None:
    """An observer for the step that is about to begin, if it is one of those that are reported."""
    interval = run.config.logging.alpha_interval
    if interval == 0 or (run.state.progress.step + 1) % interval:
        return None
    language = run.config.model.language
    heads = language.num_attention_heads // parallel_state.get_tensor_model_parallel_world_size()
    return AlphaMeter(language.num_hidden_layers, heads, get_device())


def mean_alpha(meter: AlphaMeter) -> list[list[float]]:
    """Mean alpha_V by layer and head over the step's text tokens that see an image, on every rank.

    NaN where no token sees one. Collective over the world, in one exchange: data-parallel ranks add
    up, tensor-parallel ranks bring their heads and pipeline stages their layers.
    """
    num_layers, num_heads = meter.alpha.shape
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    first = parallel_state.get_tensor_model_parallel_rank() * num_heads
    sums = torch.zeros(2, num_layers, ranks * num_heads, device=meter.alpha.device)
    sums[0, :, first : first + num_heads] = meter.alpha
    sums[1, :, first : first + num_heads] = meter.counts.unsqueeze(1)
    dist.all_reduce(sums)
    weights, tokens = sums
    return (weights / tokens).tolist()

"""A gated FFN of which only the first neurons are used.

YOPO lets visual tokens pass a share of the FFN's neurons. Which neurons these are must not depend
on how the weights are cut: under tensor parallelism the low ranks hold the first ones and do the
work, the others may have none.
"""

from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_dattn.attention import num_shared


def partial_ffn(mlp: MLP, normed: Tensor, share: float) -> Tensor:
    """What the first `share` of the neurons adds to some tokens.

    Args:
        mlp: the layer's gated FFN without biases; its first weight is `[gate; up]` on every rank.
        normed: normalized local tokens, [tokens, 1, H], equally many on every rank.

    Returns:
        Shaped like `normed`.
    """
    config, group = mlp.config, mlp.tp_group
    here = mlp.linear_fc2.weight.shape[1]
    used = num_shared(config.ffn_hidden_size, share) - group.rank() * here
    used = max(0, min(used, here))
    gate, up = (half[:used] for half in mlp.linear_fc1.weight.chunk(2))
    if config.sequence_parallel:
        tokens = gather_from_sequence_parallel_region(normed, group=group)
    else:
        tokens = copy_to_tensor_model_parallel_region(normed, group=group)
    middle = mlp.activation_func(tokens @ gate.T) * (tokens @ up.T)
    partial = middle @ mlp.linear_fc2.weight[:, :used].T
    if config.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(partial, group=group)
    return reduce_from_tensor_model_parallel_region(partial, group=group)

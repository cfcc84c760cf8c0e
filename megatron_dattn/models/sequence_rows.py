"""Reading a few rows of a tensor whose rows are sharded over the tensor-parallel ranks.

Under sequence parallelism every rank holds S / ranks of the rows. The language-model head needs the
labelled text rows only, a small share of S, so instead of gathering everything each rank fills in
the chosen rows it holds and the ranks add up.
"""

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor


def take_sharded_rows(shard: Tensor, rows: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The chosen rows of the whole tensor, equal on every rank.

    The gradient that comes back must be equal on every rank too (a following column-parallel layer
    that all-reduces its input gradient takes care of that); each rank keeps its own rows' share.

    Args:
        shard: this rank's rows, [S / ranks, ...].
        rows: indices into the S rows, int64 [N], equal on every rank.
        group: the tensor-parallel group.

    Returns:
        [N, ...]
    """
    places = rows - group.rank() * shard.shape[0]
    is_here = (places >= 0) & (places < shard.shape[0])
    chosen = shard.index_select(0, places.clamp(0, shard.shape[0] - 1))
    is_here = is_here.view(-1, *(1,) * (shard.dim() - 1))
    # where, not a product: a foreign row must not add even a NaN.
    chosen = torch.where(is_here, chosen, chosen.new_zeros(()))
    return reduce_from_tensor_model_parallel_region(chosen, group)

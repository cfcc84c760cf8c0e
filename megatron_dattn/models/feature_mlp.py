"""Vision features to the language model's width: linear -> GELU -> linear, with norms around them.

What the adapter does once in front of the decoder, and a `VisualProjector` in every layer. The two
linear layers are cut over the tensor-parallel ranks. Under sequence parallelism, which the config
says, they gather the tokens of all ranks and hand each rank its own tokens back.
"""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_dattn.models.config import AdapterNorm
from megatron_dattn.models.norm import RMSNorm


class FeatureMLP(MegatronModule):
    """The two linear layers and their norms; subclasses say which tokens pass them.

    Args:
        config: gives dtype, initialization and sequence parallelism.
        input_size: width of the encoder's features.
        hidden_size: width of the MLP's middle.
        output_size: width of the language model.
        norm_eps: of the RMSNorms.
        norm: where they stand; `norm` is the one before the linear layers, `output_norm` behind.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        input_size: int,
        hidden_size: int,
        output_size: int,
        norm_eps: float,
        norm: AdapterNorm = "before",
    ) -> None:
        super().__init__(config=config)
        tp_group = get_tensor_model_parallel_group()
        self.norm, self.output_norm = IdentityOp(), IdentityOp()
        if norm in ("before", "both"):
            self.norm = RMSNorm(config, input_size, eps=norm_eps)
        if norm in ("behind", "both"):
            self.output_norm = RMSNorm(config, output_size, eps=norm_eps)
        self.linear_fc1 = ColumnParallelLinear(
            input_size,
            hidden_size,
            config=config,
            init_method=_init_for(input_size),
            tp_group=tp_group,
        )
        self.linear_fc2 = RowParallelLinear(
            hidden_size,
            output_size,
            config=config,
            init_method=_init_for(hidden_size),
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=tp_group,
        )

    def project(self, features: Tensor) -> Tensor:
        """[..., input_size] -> [..., output_size]."""
        middle, _ = self.linear_fc1(self.norm(features))
        tokens, _ = self.linear_fc2(F.gelu(middle))
        return self.output_norm(tokens)


def _init_for(fan_in: int) -> partial[Tensor]:
    """Variance 1 / (3 fan_in), that of torch's own linear layers, at any width."""
    return partial(torch.nn.init.normal_, std=(3 * fan_in) ** -0.5)

"""T2V as a module of its own before the self-attention: the merge that the paper calls cascade.

As in Flamingo (Alayrac et al., 2022), text tokens first read the images through query, key, value
and output projections that the language model does not have, then each other through its own. The
paper (Table 3) gives the parameters (one more attention per layer) and leaves open order, norm and
start. Here both read the layer's normalized input, and the output projection starts at zero: the
layer is at first the language model's.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_dattn.attention.decode import read_images
from megatron_dattn.attention.decomposed import attend_images
from megatron_dattn.models.attention_inputs import LayerInputs
from megatron_dattn.models.projections import project


class ImageCrossAttention(MegatronModule):
    """Attention of text tokens over the images of their sample, without positions.

    Heads are those of the self-attention, cut over the tensor-parallel ranks in the same way, and
    scores are scaled and capped as there.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        layer_number: int,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        assert config.kv_channels is not None, "TransformerConfig fills these two in"
        assert config.num_query_groups is not None
        self.head_dim = config.kv_channels
        query = config.num_attention_heads * self.head_dim
        key_value = 2 * config.num_query_groups * self.head_dim
        options = {"config": config, "bias": False, "tp_group": pg_collection.tp}
        init = config.init_method
        hidden = config.hidden_size
        self.linear_q = ColumnParallelLinear(hidden, query, init_method=init, **options)
        self.linear_kv = ColumnParallelLinear(hidden, key_value, init_method=init, **options)
        self.linear_proj = RowParallelLinear(
            query,
            hidden,
            init_method=torch.nn.init.zeros_,
            input_is_parallel=True,
            skip_bias_add=False,
            **options,
        )

    def forward(self, visual: Tensor, text: Tensor, inputs: LayerInputs) -> Tensor:
        """The images' share of the text tokens, of the shape and dtype of `text`.

        Args:
            visual: normalized local visual tokens, [tokens, 1, H], of the model's dtype.
            text: normalized local text tokens, [tokens, 1, H], same dtype.
        """
        query = project(self.linear_q, text).unflatten(2, (-1, self.head_dim)).squeeze(1)
        scores = inputs.score_function
        if inputs.step is None:
            key, value = self.keys_values(visual)
            if inputs.cache is not None:
                key, value = inputs.cache.extend(key, value)  # text that it holds is not read
            inputs.show(self.layer_number, query, key)
            out = attend_images(
                query,
                key,
                value,
                inputs.plan,
                inputs.rotary,
                score_function=scores,
                backend=inputs.backend,
                elsewhere=inputs.elsewhere,
            )
        else:
            step = inputs.step
            images = step.cache.images
            assert images is not None, "see LayerInputs.has_images"
            out = read_images(query, images, step.plan, scores, step.backend)
        return project(self.linear_proj, out.flatten(1).unsqueeze(1))

    def keys_values(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of all visual tokens, [tokens, key heads here, head_dim] each, same dtype.

        Args:
            visual: normalized local visual tokens, [tokens, 1, H], of the model's dtype.
        """
        # Under sequence parallelism linear_kv gathers the ranks' visual tokens alone, which gives
        # them in packed order; of both kinds together it would interleave the ranks' shares.
        key_value = self.linear_kv(visual)[0].unflatten(2, (-1, 2, self.head_dim)).squeeze(1)
        key, value = key_value.unbind(2)
        return key, value

"""The SigLIP vision encoder on megatron-core's TransformerBlock.

megatron-core's own SigLIP attends causally without Transformer Engine, refuses image sizes that
are not whole patches and cannot stop before its last layer. Here only the layers up to the feature
layer exist, so there is no final norm either. Weights map one to one onto Hugging Face's
`SiglipVisionModel`.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.parallel_state import (
    get_tensor_model_parallel_group,
    get_tensor_model_parallel_world_size,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_dattn.models.config import VisionConfig
from megatron_dattn.models.layer_specs import Implementation, vision_block_spec


class PatchEmbedding(torch.nn.Conv2d):
    """A convolution whose stride is its kernel, computed as one matrix product over patches."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype) -> None:
        patch = vision.patch_size
        super().__init__(3, vision.hidden_size, kernel_size=patch, stride=patch, dtype=dtype)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed whole patches, row-major; pixels beyond the last whole patch are ignored.

        [images, 3, height, width] -> [images, patches, hidden_size].
        """
        images, channels, height, width = pixel_values.shape
        patch = self.kernel_size[0]
        rows, columns = height // patch, width // patch
        pixels = pixel_values[:, :, : rows * patch, : columns * patch]
        patches = pixels.reshape(images, channels, rows, patch, columns, patch)
        # Each patch's pixels in the order of the kernel's: channel, row, column.
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(images, rows * columns, -1)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class VisionEncoder(MegatronModule):
    """SigLIP up to its feature layer.

    Args:
        config: from `vision_transformer_config`.
        vision: sizes; `feature_layer` says where the features leave.
        implementation: whose linear layers and norms to use.
    """

    def __init__(
        self, config: TransformerConfig, vision: VisionConfig, implementation: Implementation
    ) -> None:
        super().__init__(config=config)
        self.vision = vision
        self.patch_embedding = PatchEmbedding(vision, config.params_dtype)
        # A parameter, not an Embedding: it is used whole, and DDP's pre-forward hooks fire only
        # for modules that are called.
        self.position_embedding = torch.nn.Parameter(
            torch.empty(vision.num_patches, vision.hidden_size, dtype=config.params_dtype)
        )
        if config.perform_initialization:
            torch.nn.init.normal_(self.position_embedding, std=vision.hidden_size**-0.5)
        self.encoder = TransformerBlock(
            config=config,
            spec=vision_block_spec(implementation, config.num_layers),
            post_layer_norm=False,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )

    def forward(
        self, pixel_values: Tensor, *, with_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Features of every patch.

        Args:
            pixel_values: [images, 3, image_size, image_size] of any floating dtype, at least one
                image.
            with_attention: return the attention that the patches receive, too.

        Returns:
            [images, patches, hidden_size], patches row-major, equal to Hugging Face's
            `hidden_states[feature_layer]`. With attention also [images, patches]: what a patch
            receives in the last layer here, on average over heads and queries; equal on all
            tensor-parallel ranks and without a gradient.
        """
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(pixel_values) + self.position_embedding
        hidden_states = patches.transpose(0, 1).contiguous()  # rows first, as megatron-core has it
        if not with_attention:
            return self.encoder(hidden_states, attention_mask=None).transpose(0, 1)
        core = self.encoder.layers[-1].self_attention.core_attention
        with core.recording() as received:
            features = self.encoder(hidden_states, attention_mask=None).transpose(0, 1)
        (of_own_heads,) = received
        return features, _mean_over_heads(of_own_heads)


def _mean_over_heads(of_own_heads: Tensor) -> Tensor:
    """The mean over the tensor-parallel ranks, which hold equally many heads."""
    dist.all_reduce(of_own_heads, group=get_tensor_model_parallel_group())
    return of_own_heads / get_tensor_model_parallel_world_size()

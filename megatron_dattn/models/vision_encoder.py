"""The SigLIP or CLIP vision encoder on megatron-core's TransformerBlock.

megatron-core's own SigLIP attends causally without Transformer Engine, refuses image sizes that
are not whole patches and cannot stop before its last layer. Here only the layers up to the feature
layer exist, so there is no final norm either. Weights map one to one onto Hugging Face's
`SiglipVisionModel` and `CLIPVisionModel`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.parallel_state import (
    get_tensor_model_parallel_group,
    get_tensor_model_parallel_world_size,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor

from megatron_dattn.models.config import VisionConfig
from megatron_dattn.models.norm import LayerNorm
from megatron_dattn.models.patch_selection import attention_received


class PatchEmbedding(torch.nn.Conv2d):
    """A convolution whose stride is its kernel, computed as one matrix product over patches."""

    def __init__(self, vision: VisionConfig, dtype: torch.dtype) -> None:
        patch = vision.patch_size
        super().__init__(
            3,
            vision.hidden_size,
            kernel_size=patch,
            stride=patch,
            bias=vision.family == "siglip",
            dtype=dtype,
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed whole patches, row-major; pixels beyond the last whole patch are ignored.

        [images, 3, height, width] -> [images, patches, hidden_size], of the weight's dtype.
        """
        images, channels, height, width = pixel_values.shape
        patch = self.kernel_size[0]
        rows, columns = height // patch, width // patch
        pixels = pixel_values[:, :, : rows * patch, : columns * patch]
        patches = pixels.reshape(images, channels, rows, patch, columns, patch)
        # Each patch's pixels in the order of the kernel's: channel, row, column.
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(images, rows * columns, -1)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class BidirectionalCore(torch.nn.Module):
    """Attention without a mask over `[patches, images, heads, head_dim]`.

    A thin wrapper around torch's scaled_dot_product_attention, which picks a flash kernel on CPU
    and GPU alike; megatron-core's unfused core would materialize the scores. What attention a patch
    receives, which no kernel tells, is computed beside it where it is asked for.

    Built and called as megatron-core builds and calls a `core_attention`; arguments that describe
    masks, packing or context parallelism have no meaning here.
    """

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, **unused: Any
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self._received: list[Tensor] | None = None
        self._asking: int | None = None

    @contextmanager
    def recording(self, asking: int | None = None) -> Iterator[list[Tensor]]:
        """Takes note of the attention that patches receive from this rank's heads.

        Every forward pass inside adds one [images, patches] to the list, of the dtype that
        `attention_received` has; a recomputation after it adds none.

        Args:
            asking: only the attention of so many leading tokens counts; by default that of all.
        """
        self._received, self._asking = [], asking
        try:
            yield self._received
        finally:
            self._received = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """The attended values.

        Args:
            query: [patches, images, heads, head_dim], of this rank's heads, any floating dtype.
            key, value: of the same shape and dtype.

        Returns:
            [patches, images, heads * head_dim], same dtype.
        """
        # [patches, images, heads, head_dim] -> [images, heads, patches, head_dim]
        query, key, value = (states.permute(1, 2, 0, 3) for states in (query, key, value))
        if self._received is not None:
            asking = query[:, :, : self._asking]
            self._received.append(attention_received(asking, key, self.softmax_scale))
        out = F.scaled_dot_product_attention(query, key, value, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)


class VisionEncoder(MegatronModule):
    """The encoder up to its feature layer.

    CLIP's class token attends and is attended to like a patch, as token 0 of an image. It has no
    place in a grid and is no feature.

    Args:
        config: from `vision_transformer_config`.
        vision: sizes; `feature_layer` says where the features leave.
        layers: see `vision_block_spec`.
    """

    def __init__(
        self, config: TransformerConfig, vision: VisionConfig, layers: TransformerBlockSubmodules
    ) -> None:
        super().__init__(config=config)
        self.vision = vision
        self.patch_embedding = PatchEmbedding(vision, config.params_dtype)
        # A parameter, not an Embedding: it is used whole, and DDP's pre-forward hooks fire only
        # for modules that are called.
        self.position_embedding = torch.nn.Parameter(
            torch.empty(vision.num_places, vision.hidden_size, dtype=config.params_dtype)
        )
        self.class_embedding: torch.nn.Parameter | None = None
        self.pre_layernorm: torch.nn.Module = IdentityOp()
        if vision.family == "clip":
            self.class_embedding = torch.nn.Parameter(
                torch.empty(vision.hidden_size, dtype=config.params_dtype)
            )
            self.pre_layernorm = LayerNorm(config, vision.hidden_size, config.layernorm_epsilon)
        if config.perform_initialization:
            for embedding in (self.position_embedding, self.class_embedding):
                if embedding is not None:
                    torch.nn.init.normal_(embedding, std=vision.hidden_size**-0.5)
        self.encoder = TransformerBlock(
            config=config,
            spec=layers,
            post_layer_norm=False,  # features leave in mid-encoder, as Hugging Face's hidden_states
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
            receives in the last layer here, on average over heads, from CLIP's class token, or,
            where there is none, on average from the patches; equal on all tensor-parallel ranks
            and without a gradient. The class token's attention to itself is left out.
        """
        tokens = self._tokens(pixel_values.to(self.patch_embedding.weight.dtype))
        hidden_states = tokens.transpose(0, 1).contiguous()  # tokens first, as megatron-core has it
        if not with_attention:
            return self._encode(hidden_states)
        core = self.encoder.layers[-1].self_attention.core_attention
        # The class token is token 0. What it asks for is what the whole image is about (FasterVLM).
        asking = None if self.class_embedding is None else 1
        with core.recording(asking) as received:
            features = self._encode(hidden_states)
        (of_own_heads,) = received
        return features, _mean_over_heads(of_own_heads)[:, -self.vision.num_patches :]

    def _tokens(self, pixel_values: Tensor) -> Tensor:
        """What enters the first layer, [images, places, hidden_size]."""
        tokens = self.patch_embedding(pixel_values)
        if self.class_embedding is not None:
            tokens = torch.cat((self.class_embedding.expand(tokens.shape[0], 1, -1), tokens), dim=1)
        return self.pre_layernorm(tokens + self.position_embedding)

    def _encode(self, hidden_states: Tensor) -> Tensor:
        """Features of the patches, without the class token's."""
        features = self.encoder(hidden_states, attention_mask=None).transpose(0, 1)
        return features if self.class_embedding is None else features[:, 1:]


def _mean_over_heads(of_own_heads: Tensor) -> Tensor:
    """The mean over the tensor-parallel ranks, which hold equally many heads."""
    # The tokens behind the encoder are replicated, so all ranks must keep the same patches.
    dist.all_reduce(of_own_heads, group=get_tensor_model_parallel_group())
    return of_own_heads / get_tensor_model_parallel_world_size()

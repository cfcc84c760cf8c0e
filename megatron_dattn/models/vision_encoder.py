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
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor

from megatron_dattn.models.config import VisionConfig
from megatron_dattn.models.norm import LayerNorm
from megatron_dattn.models.patch_selection import attention_received
from megatron_dattn.parallel.images import ImageShares


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
        config: from `vision_transformer_config`. Where it speaks of one tensor-parallel rank, and
            there are more, each has the whole encoder and takes a share of the images.
        vision: sizes; `feature_layer` says where the features leave.
        layers: see `vision_block_spec`.
    """

    def __init__(
        self, config: TransformerConfig, vision: VisionConfig, layers: TransformerBlockSubmodules
    ) -> None:
        super().__init__(config=config)
        self.vision = vision
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.shares: ImageShares | None = None
        if config.tensor_model_parallel_size < groups.tp.size():
            self.shares = ImageShares(groups.tp)
            groups.tp = groups.ep  # of this rank alone: there are no experts
        self.tp_group = groups.tp
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
            pg_collection=groups,
        )
        if self.shares is not None:
            self._become_replicas(self.shares)

    def _become_replicas(self, shares: ImageShares) -> None:
        for parameter in self.parameters():
            # megatron-core's linear layers mark their weights as shards, also the only one. The
            # gradient norm counts a shard of every rank, but of replicas the first rank's alone.
            parameter.tensor_model_parallel = False
        if self.config.perform_initialization:
            # On a GPU the linear layers draw from a random state that differs by rank.
            shares.share_values(self)

    def forward(
        self, pixel_values: Tensor, *, with_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Features of every patch.

        Args:
            pixel_values: [images, 3, image_size, image_size] of any floating dtype, at least one
                image.
            with_attention: return the attention that the patches receive, too.

        Returns:
            [images, patches, hidden_size] of the model's dtype, patches row-major, equal to Hugging
            Face's `hidden_states[feature_layer]`. With attention also fp32 [images, patches]: what
            a patch receives in the last layer here, on average over heads, from CLIP's class token,
            or, where there is none, on average from the patches; without a gradient. The class
            token's attention to itself is left out. All of it is equal on all tensor-parallel
            ranks.
        """
        if self.shares is None:
            return self._of_images(pixel_values, with_attention)
        num_images = pixel_values.shape[0]
        own = self._of_images(self.shares.take(pixel_values), with_attention)
        if isinstance(own, Tensor):
            return self.shares.gather(own, num_images)
        features, received = own
        return self.shares.gather(features, num_images), self.shares.gather(received, num_images)

    def _of_images(
        self, pixel_values: Tensor, with_attention: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `forward`, of the images that this rank takes."""
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
        # The tokens behind the encoder are replicated: ranks that hold some of the heads each must
        # keep the same patches.
        dist.all_reduce(of_own_heads, group=self.tp_group)
        return features, of_own_heads[:, -self.vision.num_patches :] / self.tp_group.size()

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

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """megatron-core's; a checkpoint does not tell whether the weights were cut over ranks."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.shares is not None:
            for entry in state.values():
                # (pipeline, tensor, data) rank among those with the same values: one rank writes.
                pipeline, _, data = entry.replica_id
                entry.replica_id = (pipeline, self.shares.group.rank(), data)
        return state

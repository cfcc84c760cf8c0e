"""The section `execution`: how the model is computed, apart from its layout over ranks.

Weights depend on none of it, so a checkpoint may be trained on under other settings.
"""

from dataclasses import dataclass, field
from typing import Literal

from megatron_dattn.errors import ConfigError

BackendName = Literal["auto", "flash_attn3", "flash_attn2", "cuda_flash", "cpu_flash", "math"]
"""`auto` and the names of `attention.backends.select.BACKENDS`; settings are read without torch."""


@dataclass(frozen=True)
class ExactSavings:
    """Work that no result depends on, and that is therefore not done.

    Outputs and gradients are the same with and without, but for the order of roundings. Where a
    preset needs the work (visual tokens that attend need queries) the switch has no effect.
    """

    visual_queries: bool = True
    """Project queries of text tokens only, where visual tokens do not attend."""
    folded_output: bool = True
    """Project a diagonal visual token's values by the output weight summed over each key head's
    group of query heads, instead of repeating them for every query head."""
    unread_tokens: bool = True
    """In the last layer that sees images, give visual tokens keys and values only."""
    labelled_logits: bool = True
    """Compute logits and losses of the tokens that predict a labelled token; else of all text
    tokens, and those without a label are dropped afterwards."""
    ffn_chunk_tokens: int = 0
    """Run the second half of a layer (norm and FFN) on this many tokens at a time and recompute
    each chunk in the backward pass, so that its activations do not grow with the pack; 0 does
    not."""

    def __post_init__(self) -> None:
        if self.ffn_chunk_tokens < 0:
            raise ConfigError(
                "execution.savings.ffn_chunk_tokens must not be negative, got "
                f"{self.ffn_chunk_tokens}"
            )


@dataclass(frozen=True)
class ExecutionConfig:
    """How the model is computed, apart from its layout over ranks; weights do not depend on it."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """Of weights and activations; the optimizer keeps fp32 in either case."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: the decoder's norms and FFN activations, which takes no matrix
    product, or whole layers."""
    attention_backend: BackendName = "auto"
    """A backend of megatron_dattn/attention/backends, or the best one that fits the device."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose linear layers and norms: Transformer Engine's, or megatron-core's and ours; auto
    takes Transformer Engine where it is installed and there is a GPU."""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """FP8 format of the language model's linear layers (Transformer Engine only)."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise"] = "tensorwise"
    """How FP8 tensors are scaled, by megatron-core's names: each by its own largest value, by that
    of the step before, or in blocks of 128 values (on Hopper and newer, with CUDA 12.9 up)."""
    encoder_tp_mode: Literal["data", "weights"] = "data"
    """What tensor-parallel ranks share of the vision encoder: the images of a pack, each rank with
    all of the encoder ("data": one message per pack, more memory for weights, less for
    activations), or every layer's weights ("weights": two messages per layer and direction)."""
    savings: ExactSavings = field(default_factory=ExactSavings)
    """Work that no result depends on and that is left out, each with its switch."""

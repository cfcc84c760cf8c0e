"""Sizes of a decoder layer, by themselves: a command line knows them without waiting for torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSizes:
    """A decoder layer with grouped heads and a gated FFN; the defaults are Mistral-7B's."""

    hidden_size: int = 4096
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 14336
    vision_hidden_size: int = 1152
    """Width of the encoder's features, SigLIP's so400m by default."""

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

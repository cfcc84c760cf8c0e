"""A pack in the order in which it is read, for attention that knows one kind of tokens.

Where every layer treats visual tokens as it treats text, the decoder runs over the pack as a
language model does: as text alone, sample behind sample. In packed order [V | T] each layer would
bring its tokens into reading order and back, and every rank would send the two kinds apart.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.layers import LayerRule
from megatron_dattn.attention.layout import TokenLayout
from megatron_dattn.attention.visual_config import VisualTokensConfig


@dataclass(frozen=True)
class ReadingOrder:
    """Where the tokens of a pack stand, on the host."""

    layout: TokenLayout
    """The same tokens as text alone."""
    tokens: Tensor
    """The packed token at every place, int64 [S]; padding comes last."""

    @property
    def places(self) -> Tensor:
        """The place of every packed token, int64 [S]."""
        return torch.empty_like(self.tokens).scatter_(
            0, self.tokens, torch.arange(len(self.tokens))
        )


def knows_one_kind(config: AttentionConfig, rules: tuple[LayerRule, ...]) -> bool:
    """True if no layer does anything else with visual tokens than with text."""
    as_text = config.positions.text, config.positions.visual
    return (
        config.attends_in_reading_order
        and as_text == ("gap", "sequence")
        and replace(config.visual, keep=1.0) == VisualTokensConfig()
        and all(rule == LayerRule(config) for rule in rules)
    )


def reading_order(layout: TokenLayout) -> ReadingOrder:
    """A pack's tokens sample by sample, each as it is read."""
    runs = [layout.runs(sample) for sample in range(layout.num_samples)]
    ranges = [(run.start, run.end) for of_sample in runs for run in of_sample]
    ranges += [
        (layout.num_visual_tokens, layout.visual_budget),
        (layout.visual_budget + layout.num_text_tokens, layout.num_tokens),
    ]
    as_text = TokenLayout(
        text_lengths=tuple(sum(run.end - run.start for run in of_sample) for of_sample in runs),
        images=(),
        visual_budget=0,
        text_budget=layout.num_tokens,
    )
    tokens = np.concatenate([np.arange(start, end) for start, end in ranges])
    return ReadingOrder(as_text, torch.from_numpy(tokens))

"""Visual tokens that are made anew in every layer, from the encoder's features (SAISA).

Where `visual.source` is "reproject", visual tokens have no state. They carry the encoder's features
through all layers and pipeline stages, padded with zeros to the language model's width, and every
decoder layer projects them to that width by an MLP of its own before it makes keys and values of
them. There is no adapter then: these MLPs do its work.
"""

import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_dattn.models.feature_mlp import FeatureMLP


def features_as_tokens(features: Tensor, hidden_size: int) -> Tensor:
    """Features padded with zeros to the language model's width.

    [images, patches, feature_size] -> [images * patches, hidden_size].
    """
    tokens = features.flatten(0, 1)
    return F.pad(tokens, (0, hidden_size - tokens.shape[1]))


class VisualProjector(FeatureMLP):
    """The adapter's MLP for one decoder layer.

    The released code of SAISA (section 3 of its paper: one projector per layer) has no norm; ours
    is the adapter's, for the same reason: features leave the encoder unnormalized.

    Args:
        config: the language model's, see `language_transformer_config`.
        feature_size: width of the encoder's features, at most `config.hidden_size`.
        norm_eps: of the RMSNorm.
    """

    def __init__(self, config: TransformerConfig, *, feature_size: int, norm_eps: float) -> None:
        super().__init__(
            config,
            input_size=feature_size,
            hidden_size=config.hidden_size,
            output_size=config.hidden_size,
            norm_eps=norm_eps,
        )
        self.feature_size = feature_size

    def forward(self, tokens: Tensor) -> Tensor:
        """This layer's visual tokens.

        Args:
            tokens: [tokens, 1, hidden_size] as `features_as_tokens` makes them; under sequence
                parallelism this rank's share, equally many on every rank.

        Returns:
            [tokens, 1, hidden_size], of the same tokens.
        """
        return self.project(tokens[..., : self.feature_size])

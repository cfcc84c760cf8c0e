"""From vision features to rows of the language model: RMSNorm, a two-layer MLP, positions.

The paper (section 3.1) names "a two-layer MLP adapter with RMSNorm" without its place. We normalize
the encoder's features before the MLP: they come from the middle of the encoder, unnormalized and
with outlier channels, and the MLP's own output scale stays free to match the text embeddings'.
(A norm behind the MLP would give visual rows a root mean square of 1, many times that of a
pretrained model's text rows, and drown what the decoder layers add to the residual stream.)
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_dattn.attention import get_preset
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.feature_mlp import FeatureMLP
from megatron_dattn.models.fractional_positions import FractionalPositions


class RowColumnPositions(torch.nn.Module):
    """Learnable positions of patches in their image: one vector per row plus one per column.

    They stand in for the rotary positions that debiased attention does not give to visual rows
    (paper, section 2.3). A grid of up to `max_grid` rows (columns) takes the first entries of the
    table; a larger one stretches the whole table over its side by linear interpolation. The tables
    start at zero, that is, as no positions at all.
    """

    def __init__(self, hidden_size: int, max_grid: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = torch.nn.Parameter(torch.zeros(max_grid, hidden_size, dtype=dtype))
        self.columns = torch.nn.Parameter(torch.zeros(max_grid, hidden_size, dtype=dtype))

    def forward(self, rows: Tensor, grid: tuple[int, int], kept: Tensor | None = None) -> Tensor:
        """Place the rows.

        Args:
            rows: [images, patches, hidden_size], all images of the same patch grid.
            grid: patch rows and patch columns.
            kept: which of the grid's patches, counted row by row, an image's rows are, int64
                [images, patches]; None if they are all of them, in this order.

        Returns:
            The rows with their positions, of the same shape.
        """
        table = self.table(grid)
        return rows + (table if kept is None else table[kept])

    def table(self, grid: tuple[int, int]) -> Tensor:
        """Positions of a grid's patches, row-major, [rows * columns, hidden_size]."""
        rows, columns = _entries(self.rows, grid[0]), _entries(self.columns, grid[1])
        return (rows.unsqueeze(1) + columns).flatten(0, 1)


def _entries(table: Tensor, count: int) -> Tensor:
    if count <= table.shape[0]:
        return table[:count]
    channels_first = table.t().unsqueeze(0)
    return F.interpolate(channels_first, size=count, mode="linear", align_corners=True)[0].t()


class Adapter(FeatureMLP):
    """The MLP over features, then positions; rows are replicated on the tensor-parallel ranks.

    Args:
        config: the vision encoder's, see `vision_transformer_config`.
        positions: places the rows; None for no positions.
        sizes: of the `FeatureMLP`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        positions: RowColumnPositions | FractionalPositions | None,
        **sizes: Any,
    ) -> None:
        super().__init__(config, **sizes)
        self.positions = positions

    def forward(
        self, features: Tensor, grid: tuple[int, int], kept: Tensor | None = None
    ) -> Tensor:
        """Rows for the language model.

        Args:
            features: [images, patches, input_size], all images of the same patch grid.
            grid: patch rows and patch columns of the whole images.
            kept: which of their patches these are, int64 [images, patches]; None if all.

        Returns:
            [images * patches, output_size].
        """
        rows = self.project(features)
        if self.positions is not None:
            rows = self.positions(rows, grid, kept)
        return rows.flatten(0, 1)


def build_adapter(config: TransformerConfig, model: ModelConfig) -> Adapter | None:
    """The adapter that a model's preset asks for; None where the layers project features anew.

    Args:
        config: the vision encoder's, see `vision_transformer_config`.
        model: sizes and the preset.
    """
    preset = get_preset(model.attention)
    if preset.visual.source == "reproject":
        return None
    output_size = model.language.hidden_size
    positions: RowColumnPositions | FractionalPositions | None = None
    if preset.positions.embedding == "row_column":
        positions = RowColumnPositions(output_size, model.adapter.max_grid, config.params_dtype)
    elif preset.positions.embedding == "fractional":
        positions = FractionalPositions(
            config,
            output_size,
            num_places=model.adapter.max_grid,
            norm_eps=model.adapter.norm_eps,
            scale=model.adapter.text_scale,
        )
    return Adapter(
        config,
        input_size=model.vision.hidden_size,
        hidden_size=model.adapter.hidden_size or output_size,
        output_size=output_size,
        norm_eps=model.adapter.norm_eps if model.adapter.input_norm else None,
        positions=positions,
    )

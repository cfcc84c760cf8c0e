"""From vision features to rows of the language model: RMSNorm, a two-layer MLP, positions.

The paper (section 3.1) names "a two-layer MLP adapter with RMSNorm" without its place. We normalize
the encoder's features before the MLP: they come from the middle of the encoder, unnormalized and
with outlier channels, and the MLP's own output scale stays free to match the text embeddings'.
(A norm behind the MLP would give visual rows a root mean square of 1, many times that of a
pretrained model's text rows, and drown what the decoder layers add to the residual stream.)
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

from megatron_dattn.attention import get_preset
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.fractional_positions import FractionalPositions
from megatron_dattn.models.norm import RMSNorm


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


class Adapter(MegatronModule):
    """RMSNorm -> linear -> GELU -> linear -> positions.

    The two linear layers are cut over the tensor-parallel ranks; rows are replicated on them.

    Args:
        config: the vision encoder's, see `vision_transformer_config`.
        input_size: width of the encoder's features.
        hidden_size: width of the MLP's middle.
        output_size: width of the language model.
        norm_eps: of the RMSNorm; None leaves it out.
        positions: places the rows; None for no positions.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        input_size: int,
        hidden_size: int,
        output_size: int,
        norm_eps: float | None,
        positions: RowColumnPositions | FractionalPositions | None,
    ) -> None:
        super().__init__(config=config)
        tp_group = get_tensor_model_parallel_group()
        self.norm = IdentityOp()
        if norm_eps is not None:
            self.norm = RMSNorm(config, input_size, eps=norm_eps)
        self.linear_fc1 = ColumnParallelLinear(
            input_size,
            hidden_size,
            config=config,
            init_method=init_for(input_size),
            tp_group=tp_group,
        )
        self.linear_fc2 = RowParallelLinear(
            hidden_size,
            output_size,
            config=config,
            init_method=init_for(hidden_size),
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=tp_group,
        )
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
        middle, _ = self.linear_fc1(self.norm(features))
        rows, _ = self.linear_fc2(F.gelu(middle))
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


def init_for(fan_in: int) -> partial[Tensor]:
    """Variance 1 / (3 fan_in), that of torch's own linear layers, at any width."""
    return partial(torch.nn.init.normal_, std=(3 * fan_in) ** -0.5)

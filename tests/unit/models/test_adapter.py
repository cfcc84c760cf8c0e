"""The adapter's arithmetic and its positions."""

import pytest
import torch
import torch.nn.functional as F

from megatron_dattn.models.adapter import Adapter, RowColumnPositions
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.models.transformer_config import vision_transformer_config
from megatron_dattn.parallel.config import ParallelConfig
from tests.support.vlm import VISION

pytestmark = pytest.mark.usefixtures("one_process")


def _adapter(max_grid: int | None) -> Adapter:
    execution = ExecutionConfig(precision="fp32")
    return Adapter(
        vision_transformer_config(VISION, ParallelConfig(), execution),
        input_size=VISION.hidden_size,
        hidden_size=24,
        output_size=20,
        norm_eps=1e-5,
        positions=None if max_grid is None else RowColumnPositions(20, max_grid, torch.float32),
    )


def test_norm_then_two_layers_with_exact_gelu():
    adapter, features = _adapter(None).double(), torch.randn(2, 6, 32, dtype=torch.float64)
    with torch.no_grad():
        for param in adapter.parameters():
            param.normal_()
    normed = F.rms_norm(features, (32,), adapter.norm.weight, 1e-5)
    first, second = adapter.linear_fc1, adapter.linear_fc2
    expected = F.linear(
        F.gelu(F.linear(normed, first.weight, first.bias)), second.weight, second.bias
    )
    rows = adapter(features, (2, 3))
    assert rows.shape == (12, 20)
    torch.testing.assert_close(rows, expected.flatten(0, 1), rtol=1e-12, atol=1e-12)


def test_positions_start_as_none_and_are_added_per_image():
    adapter, features = _adapter(4), torch.randn(2, 6, 32)
    before = adapter(features, (2, 3))
    with torch.no_grad():
        adapter.positions.rows.normal_()
        adapter.positions.columns.normal_()
    rows, columns = adapter.positions.rows, adapter.positions.columns
    added = (adapter(features, (2, 3)) - before).unflatten(0, (2, 2, 3))
    expected = rows[:2].unsqueeze(1) + columns[:3]
    torch.testing.assert_close(added, expected.expand_as(added), rtol=1e-5, atol=1e-5)


def test_kept_patches_take_their_own_places():
    adapter, features = _adapter(4), torch.randn(2, 6, 32)
    with torch.no_grad():
        adapter.positions.rows.normal_()
        adapter.positions.columns.normal_()
    kept = torch.tensor([[0, 4], [3, 5]])
    chosen = torch.stack([features[image, kept[image]] for image in range(2)])
    whole = adapter(features, (2, 3)).unflatten(0, (2, 6))
    expected = torch.stack([whole[image, kept[image]] for image in range(2)]).flatten(0, 1)
    # Matrix products of other sizes sum in another order.
    torch.testing.assert_close(adapter(chosen, (2, 3), kept), expected, rtol=1e-5, atol=1e-5)


def test_every_used_entry_is_trained_from_the_start():
    positions = RowColumnPositions(5, 4, torch.float32)
    (positions.table((3, 2)) * torch.randn(6, 5)).sum().backward()
    assert positions.rows.grad.abs().sum(-1).gt(0).tolist() == [True, True, True, False]
    assert positions.columns.grad.abs().sum(-1).gt(0).tolist() == [True, True, False, False]


def test_larger_grids_stretch_the_table():
    positions = RowColumnPositions(2, 3, torch.float64)
    with torch.no_grad():
        positions.rows.copy_(torch.tensor([[0.0, 4.0], [1.0, 5.0], [2.0, 6.0]]))
    table = positions.table((5, 1))
    expected = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(table[:, 0], expected)
    torch.testing.assert_close(table[:, 1], expected + 4)


def test_initial_rows_have_moderate_size():
    torch.manual_seed(0)
    rows = _adapter(None)(torch.randn(2, 6, 32) * 50, (2, 3))
    assert 0.03 < rows.std() < 0.5  # whatever the scale of the features

"""The adapter's arithmetic and its positions."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dattn.models.adapter import Adapter, build_adapter
from megatron_dattn.models.config import AdapterConfig, AdapterNorm, ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.models.transformer_config import vision_transformer_config
from megatron_dattn.models.visual_positions import PerPatchPositions, RowColumnPositions
from megatron_dattn.parallel.config import ParallelConfig
from tests.support.vlm import LANGUAGE, VISION, tiny_model_config

pytestmark = pytest.mark.usefixtures("one_process")


def _adapter(max_grid: int | None, norm: AdapterNorm = "before") -> Adapter:
    execution = ExecutionConfig(precision="fp32")
    return Adapter(
        vision_transformer_config(VISION, ParallelConfig(), execution),
        input_size=VISION.hidden_size,
        hidden_size=24,
        output_size=20,
        norm_eps=1e-5,
        norm=norm,
        positions=None if max_grid is None else RowColumnPositions(20, max_grid, torch.float32),
    )


@pytest.mark.parametrize("norm", ["before", "behind", "both", "none"])
def test_norms_around_two_layers_with_exact_gelu(norm: AdapterNorm):
    adapter = _adapter(None, norm).double()
    features = torch.randn(2, 6, 32, dtype=torch.float64)
    with torch.no_grad():
        for param in adapter.parameters():
            param.normal_()
    tokens = features
    if norm in ("before", "both"):
        tokens = F.rms_norm(tokens, (32,), adapter.norm.weight, 1e-5)
    first, second = adapter.linear_fc1, adapter.linear_fc2
    tokens = F.linear(
        F.gelu(F.linear(tokens, first.weight, first.bias)), second.weight, second.bias
    )
    if norm in ("behind", "both"):
        tokens = F.rms_norm(tokens, (20,), adapter.output_norm.weight, 1e-5)
    actual = adapter(features, (2, 3))
    assert actual.shape == (12, 20)
    torch.testing.assert_close(actual, tokens.flatten(0, 1), rtol=1e-12, atol=1e-12)
    names = {name for name, _ in adapter.named_parameters() if "norm" in name}
    places = {"before": {"norm"}, "behind": {"output_norm"}, "both": {"norm", "output_norm"}}
    assert names == {f"{place}.weight" for place in places.get(norm, ())}


def _built(attention: str = "dattn", **adapter: Any) -> Adapter:
    model = tiny_model_config(attention)
    model = ModelConfig(VISION, AdapterConfig(**adapter), model.language, attention)
    config = vision_transformer_config(VISION, ParallelConfig(), ExecutionConfig(precision="fp32"))
    built = build_adapter(config, model)
    assert built is not None
    return built


@pytest.mark.parametrize(("scale", "expected"), [(0.07, 0.07), (None, LANGUAGE.initializer_range)])
def test_a_norm_behind_starts_at_the_scale_of_text(scale: float | None, expected: float):
    adapter = _built(norm="behind", text_scale=scale)
    root_mean_square = adapter(torch.randn(2, 9, 32) * 50, VISION.grid).pow(2).mean(-1).sqrt()
    torch.testing.assert_close(root_mean_square, torch.full((18,), expected), rtol=1e-3, atol=0)


def test_positions_per_patch_are_one_vector_each():
    adapter, features = _built(visual_position="per_patch"), torch.randn(2, 9, 32)
    assert isinstance(adapter.positions, PerPatchPositions)
    before = adapter(features, VISION.grid)
    with torch.no_grad():
        adapter.positions.patches.normal_()
    placed = adapter(features, VISION.grid)
    added = (placed - before).unflatten(0, (2, 9))
    table = adapter.positions.patches
    assert table.shape == (9, LANGUAGE.hidden_size)
    torch.testing.assert_close(added, table.expand_as(added), rtol=1e-5, atol=1e-5)
    kept = torch.tensor([[0, 4], [3, 8]])
    chosen = torch.stack([features[image, kept[image]] for image in range(2)])
    expected = placed.unflatten(0, (2, 9)).gather(1, kept.unsqueeze(-1).expand(-1, -1, 40))
    actual = adapter(chosen, VISION.grid, kept)
    torch.testing.assert_close(actual, expected.flatten(0, 1), rtol=1e-5, atol=1e-5)


def _bicubic(lines: Tensor, length: int) -> Tensor:
    """Cubic convolution (a = -0.75) along dimension 0, sample by sample, the borders repeated."""

    def weight(distance: float) -> float:
        x, a = abs(distance), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    resized = []
    for index in range(length):
        centre = (index + 0.5) * len(lines) / length - 0.5
        left = math.floor(centre)
        taps = range(left - 1, left + 3)
        places = [min(max(tap, 0), len(lines) - 1) for tap in taps]
        terms = [weight(centre - tap) * lines[p] for tap, p in zip(taps, places, strict=True)]
        resized.append(torch.stack(terms).sum(0))
    return torch.stack(resized)


@pytest.mark.parametrize("grid", [(5, 5), (2, 4), (3, 6), (1, 1)], ids=str)
def test_another_grid_resizes_the_table_bicubically(grid: tuple[int, int]):
    positions = PerPatchPositions(5, 3, torch.float64)
    with torch.no_grad():
        positions.patches.normal_()
    picture = positions.patches.detach().unflatten(0, (3, 3))
    resized = _bicubic(_bicubic(picture, grid[0]).transpose(0, 1), grid[1]).transpose(0, 1)
    torch.testing.assert_close(positions.table(grid), resized.flatten(0, 1), rtol=0, atol=1e-12)


def test_resizing_is_computed_in_fp32():
    positions = PerPatchPositions(8, 3, torch.bfloat16)
    with torch.no_grad():
        positions.patches.normal_()
    exact = PerPatchPositions(8, 3, torch.float64)
    exact.load_state_dict(positions.state_dict())
    table = positions.table((4, 7))
    assert table.dtype == torch.bfloat16
    # One rounding to BF16's 8 digits.
    torch.testing.assert_close(table.double(), exact.table((4, 7)), rtol=2**-8, atol=1e-6)


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


def test_initial_tokens_have_moderate_size():
    torch.manual_seed(0)
    tokens = _adapter(None)(torch.randn(2, 6, 32) * 50, (2, 3))
    assert 0.03 < tokens.std() < 0.5  # whatever the scale of the features

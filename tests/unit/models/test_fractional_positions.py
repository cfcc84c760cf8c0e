"""Positions from places: against a computation patch by patch, at any grid and precision."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dattn.errors import ConfigError
from megatron_dattn.models.adapter import build_adapter
from megatron_dattn.models.config import AdapterConfig, ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.models.fractional_positions import FractionalPositions
from megatron_dattn.models.transformer_config import vision_transformer_config
from megatron_dattn.parallel.config import ParallelConfig
from tests.support.vlm import LANGUAGE, VISION, tiny_model_config

pytestmark = pytest.mark.usefixtures("one_process")

WIDTH, PLACES, EPS = 8, 5, 1e-5


def _positions(precision: str = "fp32") -> FractionalPositions:
    execution = ExecutionConfig(precision=precision)
    config = vision_transformer_config(VISION, ParallelConfig(), execution)
    torch.manual_seed(1)
    positions = FractionalPositions(config, WIDTH, num_places=PLACES, norm_eps=EPS, scale=0.03)
    with torch.no_grad():
        for name, parameter in positions.named_parameters():
            if name != "output_norm.weight":
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return positions


def _place(positions: FractionalPositions, axis: str, patch: int, length: int) -> Tensor:
    """One patch along one axis, with Python's own sine."""
    place = patch / (length - 1) * (PLACES - 1) if length > 1 else 0.0
    angles = [place / 10_000 ** (i / (WIDTH // 2)) for i in range(WIDTH // 2)]
    sinusoid = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    first, _, second = getattr(positions, f"{axis}s")
    out = torch.tensor(sinusoid, dtype=torch.float64)
    out = F.linear(F.gelu(F.linear(out, first.weight, first.bias)), second.weight, second.bias)
    norm = getattr(positions, f"{axis}_norm")
    return norm.weight * out / (out.pow(2).mean() + EPS).sqrt()


@pytest.mark.parametrize("grid", [(2, 3), (1, 1), (7, 1), (PLACES, PLACES)], ids=str)
def test_every_patch_by_hand(grid: tuple[int, int]) -> None:
    positions, (height, width) = _positions().double(), grid
    rows = torch.randn(2, height * width, WIDTH, dtype=torch.float64) * 7
    normed = F.rms_norm(rows, (WIDTH,), positions.input_norm.weight, EPS)
    placed = positions(rows, grid)
    assert placed.isfinite().all()
    for patch in range(height * width):
        row, column = divmod(patch, width)
        place = _place(positions, "row", row, height) + _place(positions, "column", column, width)
        expected = F.rms_norm(normed[:, patch] + place, (WIDTH,), eps=EPS) * 0.03
        # float64; the last norm's 0.03 was rounded to fp32 when it was set.
        torch.testing.assert_close(placed[:, patch], expected, rtol=1e-6, atol=1e-9)


def test_kept_patches_take_their_own_places() -> None:
    positions, rows = _positions(), torch.randn(2, 6, WIDTH)
    kept = torch.tensor([[1, 5], [0, 2]])
    whole = positions(rows, (2, 3))
    for image in range(2):
        placed = positions(rows[image : image + 1, kept[image]], (2, 3), kept[image : image + 1])
        torch.testing.assert_close(placed[0], whole[image, kept[image]])


def test_places_are_computed_in_fp32() -> None:
    """BF16 weights, but no rounding of places or between the layers."""
    positions = _positions("bf16")
    exact = _positions("bf16").double()
    assert positions.rows[0].weight.dtype == torch.bfloat16
    table = positions.table((40, 3))
    assert table.dtype == torch.float32
    # BF16 anywhere in between would be wrong by 4e-3.
    torch.testing.assert_close(table.double(), exact.table((40, 3)), rtol=1e-4, atol=1e-5)
    assert positions(torch.randn(1, 120, WIDTH).bfloat16(), (40, 3)).dtype == torch.bfloat16


def test_every_parameter_is_trained_from_the_start() -> None:
    positions = _positions()
    positions(torch.randn(2, 6, WIDTH), (2, 3)).pow(3).sum().backward()
    for name, parameter in positions.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.fixture
def vidi() -> ModelConfig:
    return tiny_model_config("vidi")


def test_initial_rows_have_the_scale_of_text(vidi: ModelConfig) -> None:
    adapter_config = AdapterConfig(max_grid=4, text_scale=0.07)
    model = dataclasses.replace(vidi, adapter=adapter_config)
    execution = ExecutionConfig(precision="fp32")
    config = vision_transformer_config(VISION, ParallelConfig(), execution)
    torch.manual_seed(0)
    adapter = build_adapter(config, model)
    assert adapter is not None
    rows = adapter(torch.randn(2, 9, VISION.hidden_size) * 50, VISION.grid)
    root_mean_square = rows.pow(2).mean(-1).sqrt()
    torch.testing.assert_close(root_mean_square, torch.full((18,), 0.07), rtol=1e-3, atol=0)


def test_impossible_sizes_are_refused(vidi: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.text_scale must be positive, got 0\.0"):
        AdapterConfig(text_scale=0.0)
    language = dataclasses.replace(LANGUAGE, hidden_size=41)
    with pytest.raises(ConfigError, match=r"hidden_size 41 is odd"):
        dataclasses.replace(vidi, language=language)

"""The preset `vidi` against its authors' adapter: formulas, names of weights, initial values."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_dattn.errors import ConfigError
from megatron_dattn.models.adapter import Adapter, build_adapter
from megatron_dattn.models.config import AdapterConfig, ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.models.transformer_config import vision_transformer_config
from megatron_dattn.parallel.config import ParallelConfig
from tests.support.vidi_adapter import OUR_NAMES, random_weights, vidi_tokens
from tests.support.vlm import LANGUAGE, VISION, tiny_model_config

pytestmark = pytest.mark.usefixtures("one_process")

FEATURES, WIDTH = VISION.hidden_size, LANGUAGE.hidden_size


def _vidi(precision: str = "fp32", **adapter: object) -> Adapter:
    """The preset's adapter as it is without any setting, but for those named."""
    model = dataclasses.replace(tiny_model_config("vidi"), adapter=AdapterConfig(**adapter))
    config = vision_transformer_config(
        VISION, ParallelConfig(), ExecutionConfig(precision=precision)
    )
    torch.manual_seed(1)
    built = build_adapter(config, model)
    assert built is not None
    return built


def _with_their_weights(adapter: Adapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """Load weights that have the names of the published checkpoints."""
    weights = random_weights(FEATURES, WIDTH, dtype)
    adapter.to(dtype).load_state_dict({OUR_NAMES[name]: value for name, value in weights.items()})
    return weights


def test_every_parameter_has_its_name_in_the_authors_checkpoints() -> None:
    ours = {name: tuple(value.shape) for name, value in _vidi().named_parameters()}
    theirs = random_weights(FEATURES, WIDTH, torch.float32)
    assert ours == {OUR_NAMES[name]: tuple(value.shape) for name, value in theirs.items()}


@pytest.mark.parametrize(
    ("grid", "num_places"), [((3, 3), None), ((5, 2), None), ((3, 4), 7), ((1, 1), 4)], ids=str
)
def test_float64_equals_the_authors_formulas(grid: tuple[int, int], num_places: int | None) -> None:
    """Their images have the encoder's own grid, where places are whole numbers; tiles stretch."""
    adapter = _vidi(num_places=num_places)
    weights = _with_their_weights(adapter, torch.float64)
    features = torch.randn(2, grid[0] * grid[1], FEATURES, dtype=torch.float64) * 7
    tokens = adapter(features, grid).unflatten(0, (2, -1))
    for image in range(2):
        expected = vidi_tokens(weights, features[image], grid, num_places or VISION.grid[0])
        torch.testing.assert_close(tokens[image], expected, rtol=1e-12, atol=1e-12)


def test_bf16_rounds_where_the_authors_round() -> None:
    """Position MLPs in fp32, every sum and norm rounded; a kernel's order of summation flips a
    rounding here and there. The projector has no biases, as Megatron's linear layers round before
    they add them."""
    adapter = _vidi("bf16")
    weights = random_weights(FEATURES, WIDTH, torch.bfloat16)
    for layer in (0, 2):
        weights[f"mm_rand_projector.model.{layer}.bias"].zero_()
    adapter.load_state_dict({OUR_NAMES[name]: value for name, value in weights.items()})
    features = (torch.randn(1, 9, FEATURES) * 7).bfloat16()
    tokens = adapter(features, VISION.grid)
    expected = vidi_tokens(weights, features[0], VISION.grid, VISION.grid[0])
    assert tokens.dtype == torch.bfloat16
    # Adding both positions at once changes two fifths of the values.
    assert (tokens != expected).float().mean() < 0.02
    torch.testing.assert_close(tokens, expected, rtol=2**-6, atol=2**-6)


def test_kept_patches_take_their_own_places() -> None:
    positions, tokens = _vidi().positions, torch.randn(2, 6, WIDTH)
    kept = torch.tensor([[1, 5], [0, 2]])
    whole = positions(tokens, (2, 3))
    for image in range(2):
        placed = positions(tokens[image : image + 1, kept[image]], (2, 3), kept[image : image + 1])
        torch.testing.assert_close(placed[0], whole[image, kept[image]])


def test_every_parameter_is_trained_from_the_start() -> None:
    adapter = _vidi()
    adapter(torch.randn(2, 6, FEATURES), (2, 3)).pow(3).sum().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_norms_start_as_the_authors_start_them() -> None:
    """One behind the MLP; the last at the deviation of the embeddings, or as the settings say."""
    adapter = _vidi(text_scale=0.07)
    assert adapter.output_norm.weight.eq(1.0).all()
    tokens = adapter(torch.randn(2, 9, FEATURES) * 50, VISION.grid)
    root_mean_square = tokens.pow(2).mean(-1).sqrt()
    torch.testing.assert_close(root_mean_square, torch.full((18,), 0.07), rtol=1e-3, atol=0)
    as_new_embeddings = torch.full((WIDTH,), LANGUAGE.initializer_range)
    torch.testing.assert_close(_vidi().positions.last_norm.weight.data, as_new_embeddings)


@pytest.fixture
def vidi() -> ModelConfig:
    return tiny_model_config("vidi")


def test_impossible_sizes_are_refused(vidi: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.text_scale must be positive, got 0\.0"):
        AdapterConfig(text_scale=0.0)
    language = dataclasses.replace(LANGUAGE, hidden_size=41)
    with pytest.raises(ConfigError, match=r"hidden_size 41 is odd"):
        dataclasses.replace(vidi, language=language)

"""A layer's projector of visual tokens, and the model's first stage where there is no adapter."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megatron_dattn.errors import ConfigError
from megatron_dattn.models.adapter import VisualProjector, features_as_tokens
from megatron_dattn.models.build import check_model_sizes
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.models.transformer_config import language_transformer_config
from megatron_dattn.parallel.config import ParallelConfig
from tests.support.vlm import (
    LANGUAGE,
    VISION,
    join_tokens,
    make_batch,
    tiny_model,
    tiny_model_config,
)

pytestmark = pytest.mark.usefixtures("one_process")


def _projector() -> VisualProjector:
    execution = ExecutionConfig(precision="fp32")
    config = language_transformer_config(LANGUAGE, ParallelConfig(), execution)
    return VisualProjector(config, feature_size=VISION.hidden_size, norm_eps=1e-5)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_norm_then_two_layers_over_the_features_alone(count: int) -> None:
    projector = _projector().double()
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.normal_()
    features = torch.randn(1, count, VISION.hidden_size, dtype=torch.float64)
    first, second = projector.linear_fc1, projector.linear_fc2
    normed = F.rms_norm(features[0], (VISION.hidden_size,), projector.norm.weight, 1e-5)
    middle = F.gelu(F.linear(normed, first.weight, first.bias))
    expected = F.linear(middle, second.weight, second.bias)
    tokens = features_as_tokens(features, LANGUAGE.hidden_size).unsqueeze(1)
    assert tokens.shape == (count, 1, LANGUAGE.hidden_size)
    torch.testing.assert_close(projector(tokens).squeeze(1), expected, rtol=1e-12, atol=1e-12)


def test_initial_tokens_have_moderate_size() -> None:
    torch.manual_seed(0)
    tokens = features_as_tokens(torch.randn(2, 6, VISION.hidden_size) * 50, LANGUAGE.hidden_size)
    assert 0.03 < _projector()(tokens.unsqueeze(1)).std() < 0.5  # whatever the features' scale


@pytest.fixture
def saisa() -> ModelConfig:
    return tiny_model_config("saisa")


def test_visual_tokens_are_the_features_and_there_is_no_adapter(saisa) -> None:
    model, batch = tiny_model(saisa), make_batch([9, 5], [(3, 6), ()])
    assert model.adapter is None
    with torch.no_grad():
        tokens = join_tokens(model, batch)
        features = model.vision_model(batch.pixel_values).flatten(0, 1)
    assert torch.equal(tokens[:18, 0, : VISION.hidden_size], features)
    assert not tokens[:36, 0, VISION.hidden_size :].any()
    assert not tokens[18:36].any()  # the rest of the budget


@pytest.mark.parametrize("images", [[(3,)], []], ids=["image", "text alone"])
@pytest.mark.parametrize("frozen", [(), ("vision_model",), ("vision_model", "language_model")])
def test_the_first_layer_gets_gradients_whatever_is_frozen(saisa, images, frozen) -> None:
    """Recomputed layers train only if their input wants a gradient, also without an adapter."""
    model = tiny_model(saisa)
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    tokens = join_tokens(model, make_batch([9], images))
    assert tokens.requires_grad
    tokens.sum().backward()
    for parameter in model.vision_model.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad


def test_validation_needs_no_gradient(saisa) -> None:
    with torch.no_grad():
        assert not join_tokens(tiny_model(saisa), make_batch([9], [(3,)])).requires_grad


def test_features_wider_than_the_language_model_are_refused(saisa) -> None:
    vision = dataclasses.replace(VISION, hidden_size=48)
    with pytest.raises(ConfigError, match=r"vision\.hidden_size 48 .* language\.hidden_size 40"):
        dataclasses.replace(saisa, vision=vision)


def test_projectors_must_be_cut_evenly(saisa) -> None:
    language = dataclasses.replace(LANGUAGE, hidden_size=41)
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    model = dataclasses.replace(saisa, language=language)
    with pytest.raises(ConfigError, match=r"2 does not divide model\.language\.hidden_size 41"):
        check_model_sizes(model, parallel, ExecutionConfig())

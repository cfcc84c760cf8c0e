"""The measurement runs, and compares answers while it does."""

import pytest
import torch

from benchmarks.bench_image_cache import make_prompts, measure
from megatron_dattn.hf.configuration_dattn import DAttnConfig
from megatron_dattn.hf.modeling_dattn import DAttnForConditionalGeneration
from tests.unit.conversion.hf_models import LANGUAGE_SIZES, VISION_SIZES


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = DAttnConfig(
        vision_config=VISION_SIZES,
        text_config=LANGUAGE_SIZES,
        image_token_id=5,
        adapter_hidden_size=48,
    )
    return DAttnForConditionalGeneration(config).eval()


def test_measures_what_it_names(model):
    prompts = make_prompts(model.config, images=2, questions=3, text_tokens=4)
    assert prompts.shape == (3, 1, 6)
    assert (prompts[:, 0, :2] == 5).all()
    seconds = measure(model, torch.randn(2, 3, 28, 28), prompts)
    assert list(seconds) == ["encode", "pixels", "cache"]
    assert min(seconds.values()) > 0


def test_a_cache_that_changes_answers_is_noticed(model, monkeypatch):
    prompts = make_prompts(model.config, images=1, questions=2, text_tokens=4)
    wrong = model.encode_images(torch.zeros(1, 3, 28, 28))
    wrong = type(wrong)(wrong.keys, tuple(100 * value for value in wrong.values), wrong.entries)
    right = model.model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda pixels: wrong)
    monkeypatch.setattr(model.model, "encode_images", right)
    with pytest.raises(AssertionError, match="changed an answer"):
        measure(model, torch.randn(1, 3, 28, 28), prompts)

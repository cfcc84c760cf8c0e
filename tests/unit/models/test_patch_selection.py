"""Which patches are kept, and a model that keeps some: it sees these and nothing else."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_dattn.attention import PRESETS
from megatron_dattn.batch import PackedBatch
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.models.patch_selection import attention_received, most_attended, take_patches
from megatron_dattn.models.vlm import DAttnVLM
from tests.support.vlm import CLIP, VISION, join_tokens, make_batch, tiny_model, tiny_model_config

pytestmark = pytest.mark.usefixtures("one_process")

KEPT = 2  # a quarter of 3 x 3 patches


@pytest.mark.parametrize("patches", [1, 64, 150])  # one chunk of queries or several
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_received_equals_a_dense_softmax(patches: int, scale: float | None) -> None:
    query, key = torch.randn(2, 3, 4, patches, 8, dtype=torch.float64)
    scores = torch.einsum("ihqd,ihkd->ihqk", query, key) * (scale or 8**-0.5)
    expected = scores.softmax(-1).mean(dim=(1, 2))
    received = attention_received(query, key, scale)
    torch.testing.assert_close(received, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(received.sum(1), torch.ones(3, dtype=torch.float64))


def test_the_attention_of_one_token_alone() -> None:
    query, key = torch.randn(2, 3, 4, 10, 8, dtype=torch.float64)
    expected = torch.einsum("ihd,ihkd->ihk", query[:, :, 0], key).mul(0.7).softmax(-1).mean(dim=1)
    received = attention_received(query[:, :, :1], key, 0.7)
    torch.testing.assert_close(received, expected, rtol=1e-12, atol=1e-12)


def test_halves_are_computed_in_fp32() -> None:
    query, key = torch.randn(2, 2, 4, 90, 8).bfloat16()
    received = attention_received(query, key)
    assert received.dtype == torch.float32
    # Only fp32 rounding is left; BF16 scores would be wrong by 4e-3.
    exact = attention_received(query.double(), key.double())
    torch.testing.assert_close(received.double(), exact, rtol=1e-5, atol=1e-8)


def test_the_best_are_kept_in_the_order_of_the_image() -> None:
    received = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.0, 0.1, 0.2], [0.25, 0.25, 0.25, 0.25]])
    kept = most_attended(received, 2)
    assert kept.tolist() == [[1, 3], [0, 3], [0, 1]]
    features = torch.arange(24.0).reshape(3, 4, 2).requires_grad_()
    chosen = take_patches(features, kept)
    assert chosen[..., 0].tolist() == [[2.0, 6.0], [8.0, 14.0], [16.0, 18.0]]
    chosen.sum().backward()
    assert features.grad[..., 0].sum(1).tolist() == [2.0, 2.0, 2.0]


@pytest.fixture
def fastervlm() -> ModelConfig:
    return tiny_model_config("fastervlm")


def test_the_decoder_sees_a_line_of_kept_patches(fastervlm: ModelConfig) -> None:
    assert fastervlm.image_grid == (1, KEPT)
    assert fastervlm.tokens_per_image == KEPT
    whole = tiny_model_config("s_attn")
    assert (whole.image_grid, whole.tokens_per_image) == ((3, 3), 9)


def _batch() -> PackedBatch:
    return make_batch([9, 5, 8], [(3,), (), (0, 5)], grid=(1, KEPT))


def _features_and_kept(model: DAttnVLM, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """All features, and by plain sorting the places of those that are kept."""
    with torch.no_grad():
        features, received = model.vision_model(pixels, with_attention=True)
    kept = [sorted(sorted(range(9), key=token.__getitem__)[-KEPT:]) for token in received.tolist()]
    assert len({tuple(places) for places in kept}) > 1, "one choice for all images shows nothing"
    return features, torch.tensor(kept)


def test_loss_is_that_of_a_model_fed_with_the_kept_features(fastervlm: ModelConfig) -> None:
    model, conventional = tiny_model(fastervlm), tiny_model(tiny_model_config("s_attn"))
    batch = _batch()
    features, kept = _features_and_kept(model, batch.pixel_values)
    fed = torch.stack([features[image, places] for image, places in enumerate(kept)])
    conventional.vision_model.forward = lambda pixel_values: fed
    with torch.no_grad():
        assert torch.equal(model(batch), conventional(batch))
        conventional.vision_model.forward = lambda pixel_values: features[:, :KEPT]
        assert not torch.allclose(model(batch), conventional(batch), atol=1e-3)


def test_clip_s_class_token_chooses() -> None:
    """Its choice, by the encoder's own projections, is what the decoder gets."""
    model = tiny_model(tiny_model_config("fastervlm", vision=CLIP))
    encoder, pixels = model.vision_model, _batch().pixel_values
    seen: list[Tensor] = []
    core = encoder.encoder.layers[-1].self_attention.core_attention
    hook = core.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:2]))
    with torch.no_grad():
        features, kept, _ = model.encode(pixels)
        every_feature = encoder(pixels)
    hook.remove()
    query, key = (tokens.permute(1, 2, 0, 3) for tokens in seen[:2])  # [images, heads, tokens, D]
    scores = torch.einsum("ihqd,ihkd->ihqk", query, key) * query.shape[-1] ** -0.5
    attention = scores.softmax(-1)

    def best(received: Tensor) -> list[list[int]]:
        return received[:, 1:].topk(KEPT).indices.sort().values.tolist()

    by_token = best(attention[:, :, 0].mean(1))
    assert kept.tolist() == by_token
    assert by_token != best(attention.mean((1, 2))), "all tokens would choose the same"
    assert torch.equal(
        features, torch.stack([f[k] for f, k in zip(every_feature, kept, strict=True)])
    )


def test_embedded_positions_are_those_of_the_kept_patches(
    fastervlm: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = dataclasses.replace(PRESETS["dattn"], visual=PRESETS["fastervlm"].visual)
    monkeypatch.setitem(PRESETS, "fastervlm", preset)
    model, batch = tiny_model(fastervlm), _batch()
    features, kept = _features_and_kept(model, batch.pixel_values)
    with torch.no_grad():
        whole = model.adapter(features, VISION.grid).unflatten(0, (-1, 9))
        tokens = join_tokens(model, batch)[: 3 * KEPT, 0]
    expected = torch.cat([whole[image, places] for image, places in enumerate(kept)])
    # Matrix products of other sizes sum in another order.
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", [[(3,)], []], ids=["image", "text alone"])
def test_every_parameter_gets_a_gradient(fastervlm: ModelConfig, images: list) -> None:
    model = tiny_model(fastervlm)
    model(make_batch([9], images, grid=(1, KEPT))).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

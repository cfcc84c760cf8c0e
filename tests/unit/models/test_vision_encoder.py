"""The vision encoder equals Hugging Face's SigLIP and CLIP; every patch sees every patch."""

import dataclasses

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_dattn.conversion.families.registry import vision_rules
from megatron_dattn.models.config import VisionConfig
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.models.layer_specs import vision_block_spec
from megatron_dattn.models.transformer_config import vision_transformer_config
from megatron_dattn.models.vision_encoder import PatchEmbedding, VisionEncoder
from megatron_dattn.parallel.config import ParallelConfig
from tests.support.vlm import CLIP, VISION

pytestmark = pytest.mark.usefixtures("one_process")


both_families = pytest.mark.parametrize("vision", [VISION, CLIP], ids=lambda v: v.family)


def _encoder(vision: VisionConfig = VISION, **execution) -> VisionEncoder:
    execution = ExecutionConfig(**{"precision": "fp32", **execution})
    config = vision_transformer_config(vision, ParallelConfig(), execution)
    return VisionEncoder(config, vision, vision_block_spec("local", config.num_layers))


def _hugging_face(vision: VisionConfig) -> SiglipVisionModel | CLIPVisionModel:
    fields = dataclasses.asdict(vision)
    del fields["feature_layer"], fields["family"]
    torch.manual_seed(5)
    if vision.family == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**fields))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**fields))
    with torch.no_grad():  # its initial biases are zero and its norms one: let them matter
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.1)
    return model


def _pair(
    vision: VisionConfig, feature_layer: int, dtype: torch.dtype
) -> tuple[VisionEncoder, SiglipVisionModel | CLIPVisionModel]:
    vision = dataclasses.replace(vision, feature_layer=feature_layer)
    ours, theirs = _encoder(vision).to(dtype), _hugging_face(vision).to(dtype)
    weights, params = theirs.state_dict(), dict(ours.named_parameters())
    with torch.no_grad():
        for rule in vision_rules(vision):
            source = rule.layout.join([weights[n] for n in rule.sources])
            params.pop(rule.megatron).copy_(source)
    assert not params
    return ours, theirs


def _images(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 3, VISION.image_size, VISION.image_size, generator=generator).to(
        dtype
    )


@pytest.mark.parametrize("feature_layer", [-1, -2, -3])
@pytest.mark.parametrize(
    # The two only sum in different orders; float64 shows that nothing else differs.
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-10)],
)
@both_families
def test_features_equal_hugging_face(vision, feature_layer, dtype, tolerance):
    ours, theirs = _pair(vision, feature_layer, dtype)
    images = _images(3, dtype)
    with torch.no_grad():
        expected = theirs(images, output_hidden_states=True).hidden_states[feature_layer]
        expected = expected[:, -vision.num_patches :]  # without the class token
        features = ours(images)
    assert features.shape == (3, VISION.num_patches, VISION.hidden_size)
    torch.testing.assert_close(features, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("feature_layer", [-1, -2])
@both_families
def test_attention_received_equals_hugging_face(vision, feature_layer):
    ours, theirs = _pair(vision, feature_layer, torch.float64)
    theirs.set_attn_implementation("eager")
    images = _images(3, torch.float64)
    with torch.no_grad():
        layers = theirs(images, output_attentions=True).attentions
        features, received = ours(images, with_attention=True)
        # [images, heads, queries, keys] of the last layer that the features passed.
        of_heads = layers[len(layers) + feature_layer]
        if vision.family == "clip":  # what the class token, token 0, gives to the patches
            expected = of_heads[:, :, 0, 1:].mean(dim=1)
        else:
            expected = of_heads.mean(dim=(1, 2))
    # Its eager softmax is fp32 whatever the inputs are.
    torch.testing.assert_close(received, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(features, ours(images))
    assert received.std() > 1e-4


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_attention_received_leaves_gradients_alone(recompute):
    encoder, images = _encoder(recompute=recompute), _images(2)
    features, received = encoder(images, with_attention=True)
    assert not received.requires_grad
    features.pow(2).sum().backward()
    grads = [param.grad for param in encoder.parameters()]
    encoder.zero_grad()
    encoder(images).pow(2).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, encoder.parameters(), strict=True))


@both_families
def test_gradients_equal_hugging_face(vision):
    ours, theirs = _pair(vision, -2, torch.float64)
    images = _images(2, torch.float64)
    weights = torch.randn(2, VISION.num_patches, VISION.hidden_size, dtype=torch.float64)
    features = theirs(images, output_hidden_states=True).hidden_states[-2]
    (features[:, -vision.num_patches :] * weights).sum().backward()
    (ours(images) * weights).sum().backward()
    expected = {name: param.grad for name, param in theirs.named_parameters()}
    for rule in vision_rules(vision):
        grad = ours.get_parameter(rule.megatron).grad
        joined = rule.layout.join([expected[name] for name in rule.sources])
        # Key biases get no gradient but rounding noise: they shift all scores of a query alike.
        torch.testing.assert_close(grad, joined, rtol=1e-9, atol=1e-11, msg=rule.megatron)


def test_every_patch_sees_the_last_one():
    encoder, images = _encoder(), _images(1)
    changed = images.clone()
    changed[..., 28:42, 28:42] += 1.0  # the last of 3 x 3 patches
    with torch.no_grad():
        moved = (encoder(images) - encoder(changed)).abs().amax(-1)
    assert (moved > 1e-6).all()


def test_images_do_not_see_each_other():
    encoder, images = _encoder(), _images(2)
    with torch.no_grad():
        together, alone = encoder(images), encoder(images[1:])
    # Another batch size may choose another kernel, so not bitwise.
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-5)


def test_pixels_beyond_the_last_whole_patch_are_ignored():
    encoder, images = _encoder(), _images(1)
    changed = images.clone()
    changed[..., 42:, :] = changed[..., :, 42:] = 99.0
    assert torch.equal(encoder(images), encoder(changed))


def test_384_pixels_hold_27_by_27_patches_of_14():
    vision = dataclasses.replace(VisionConfig(), hidden_size=8, num_attention_heads=2)
    patches = PatchEmbedding(vision, torch.float32)(torch.zeros(1, 3, 384, 384))
    assert vision.grid == (27, 27)
    assert patches.shape == (1, 27 * 27, 8)


def test_patch_embedding_equals_a_convolution():
    embedding, images = PatchEmbedding(VISION, torch.float64), _images(2, torch.float64)
    expected = torch.nn.Conv2d.forward(embedding, images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedding(images), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute):
    grads = []
    for mode in ("none", recompute):
        torch.manual_seed(3)
        encoder = _encoder(recompute=mode)
        encoder(_images(2)).pow(2).sum().backward()
        grads.append([param.grad for param in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

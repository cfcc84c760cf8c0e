"""The whole model in one process: equal to LLaVA, independent of packing, complete graphs."""

import pytest
import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    SiglipVisionConfig,
)

from megatron_dattn.attention import PRESETS
from megatron_dattn.models.config import ExactSavings
from megatron_dattn.models.vlm import DAttnVLM
from tests.support.vlm import (
    LANGUAGE,
    VISION,
    load_hugging_face,
    make_batch,
    tiny_model,
    tiny_model_config,
)

pytestmark = pytest.mark.usefixtures("one_process")

IMAGE_TOKEN = LANGUAGE.vocab_size - 1


def _llava() -> LlavaForConditionalGeneration:
    language = {name: getattr(LANGUAGE, name) for name in _SHARED_LANGUAGE_FIELDS}
    vision = {name: getattr(VISION, name) for name in _SHARED_VISION_FIELDS}
    rope = {"rope_type": "default", "rope_theta": LANGUAGE.rope_theta}
    torch.manual_seed(13)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=SiglipVisionConfig(**vision),
            text_config=MistralConfig(
                **language, rope_parameters=rope, sliding_window=None, initializer_range=0.2
            ),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=VISION.feature_layer,
            vision_feature_select_strategy="full",
            projector_hidden_act="gelu",
        )
    ).eval()


_SHARED_VISION_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
    "layer_norm_eps",
)
_SHARED_LANGUAGE_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
)


def _as_llava(model: DAttnVLM, llava: LlavaForConditionalGeneration) -> None:
    """Llava's weights; its projector has no norm."""
    text = {f"model.{n}": w for n, w in llava.model.language_model.state_dict().items()}
    text["lm_head.weight"] = llava.lm_head.weight
    load_hugging_face(model, vision=llava.model.vision_tower.state_dict(), text=text)
    model.adapter.norm = torch.nn.Identity()
    projector = llava.model.multi_modal_projector
    with torch.no_grad():
        for ours, theirs in (
            (model.adapter.linear_fc1, projector.linear_1),
            (model.adapter.linear_fc2, projector.linear_2),
        ):
            ours.weight.copy_(theirs.weight)
            ours.bias.copy_(theirs.bias)


@pytest.mark.parametrize(
    "images",
    [
        [(0,)],  # first thing in the sample
        [(4,)],
        [(9,)],  # last thing
        [(2, 2, 7)],  # two neighbours and a third
        [(3,), (), (1, 5)],  # ragged pack with a text-only sample
    ],
    ids=str,
)
def test_s_attn_equals_llava(images):
    llava, model = _llava(), tiny_model(tiny_model_config("s_attn"))
    _as_llava(model, llava)
    lengths = [9, 5, 8][: len(images)]
    batch = make_batch(lengths, images, budgets=(36, 24))
    batch.input_ids.clamp_(max=IMAGE_TOKEN - 1)
    first_image = 0
    for sample, offsets in enumerate(images):
        start, end = batch.layout.text_rows(sample)
        with torch.no_grad():
            logits = model.forward_logits(batch, torch.arange(start, end))
            expected = _llava_text_logits(
                llava,
                batch.input_ids[start - 36 : end - 36].tolist(),
                offsets,
                batch.pixel_values[first_image : first_image + len(offsets)],
            )
        first_image += len(offsets)
        # fp32 sums in another order, through encoder, adapter and decoder.
        torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)


def _llava_text_logits(
    llava: LlavaForConditionalGeneration,
    text: list[int],
    offsets: tuple[int, ...],
    pixels: Tensor,
) -> Tensor:
    ids: list[int] = []
    for place in range(len(text) + 1):
        ids += [IMAGE_TOKEN] * VISION.num_patches * offsets.count(place)
        ids += text[place : place + 1]
    ids_tensor = torch.tensor([ids])
    images = {"pixel_values": pixels} if len(pixels) else {}
    return llava(input_ids=ids_tensor, **images).logits[0][ids_tensor[0] != IMAGE_TOKEN]


@pytest.mark.parametrize("preset", ["dattn", "dattn_biased"])
def test_a_visual_row_never_changes_another_one(preset):
    """At every layer: what diagonal V2V attention promises."""
    every_row = ExactSavings(unread_rows=False)
    model = tiny_model(tiny_model_config(preset), savings=every_row)
    batch = make_batch([6, 4], [(2, 2), (1,)])
    states: list[Tensor] = []
    for layer in model.language_model.decoder.layers:
        layer.register_forward_hook(lambda module, args, out: states.append(out[0]))
    with torch.no_grad():
        rows = model._decoder_input(batch)
        attention = model._attention_inputs(batch.layout, rows.device)
        model.language_model(rows, attention)
        changed = rows.clone()
        changed[7] += 1.0
        model.language_model(changed, attention)
    for before, after in zip(states[:2], states[2:], strict=True):
        moved = (before != after).flatten(1).any(1).nonzero().squeeze(1).tolist()
        visual = [row for row in moved if row < batch.layout.visual_budget]
        text = [row for row in moved if row >= batch.layout.visual_budget]
        assert visual == [7]
        assert text == list(range(*batch.layout.text_rows(0)))  # all text of its sample, no other


def _gradients(model: DAttnVLM) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _loss_and_gradients(model: DAttnVLM, batches) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    losses = [model(batch) for batch in batches]
    torch.cat(losses).sum().backward()
    return torch.cat(losses).detach(), _gradients(model)


@pytest.mark.parametrize("preset", PRESETS)
def test_loss_and_gradients_do_not_depend_on_packing(preset):
    """Three samples in one pack, or in packs of their own with other budgets."""
    config = tiny_model_config(preset)
    model, grid = tiny_model(config), config.image_grid
    texts, images = [9, 5, 8], [(3,), (), (0, 5)]
    loss, grads = _loss_and_gradients(model, [make_batch(texts, images, grid=grid)])
    alone = [
        make_batch([texts[i]], [images[i]], budgets=(20 + i, 10 + i), first_sample=i, grid=grid)
        for i in range(3)
    ]
    loss_alone, grads_alone = _loss_and_gradients(model, alone)
    torch.testing.assert_close(loss, loss_alone, rtol=1e-5, atol=1e-6)
    assert grads.keys() == grads_alone.keys()
    for name, grad in grads.items():
        # fp32 sums over samples in another order, relative to the parameter's largest entry.
        atol = 2e-5 * grad.abs().max().item()
        torch.testing.assert_close(grads_alone[name], grad, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute):
    batch = make_batch([9, 5, 8], [(3,), (), (0, 5)])
    loss, grads = _loss_and_gradients(tiny_model(), [batch])
    again, grads_again = _loss_and_gradients(tiny_model(recompute=recompute), [batch])
    assert torch.equal(loss, again)
    assert grads.keys() == grads_again.keys()
    for name, grad in grads.items():
        # The same operations; but a layer's output gradient may arrive in another memory layout,
        # and then the bias gradients sum it in another order.
        atol = 1e-6 * grad.abs().max().item() if name.endswith("bias") else 0
        torch.testing.assert_close(grads_again[name], grad, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("frozen", [(), ("vision_model",), ("vision_model", "language_model")])
@pytest.mark.parametrize(
    "batch",
    [
        make_batch([9, 5], [(3,), ()]),
        make_batch([9, 5]),  # no images
        make_batch([9, 5], [(3,), ()], unlabelled=True),
        make_batch([9, 5], unlabelled=True),
    ],
    ids=["full", "no images", "no labels", "neither"],
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_trained_parameter_gets_a_gradient(frozen, batch, recompute):
    """Also without images or labels: a reduction over data-parallel ranks waits for all of them."""
    model = tiny_model(recompute=recompute)
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    losses = model(batch)
    assert losses.shape == ((batch.labels != -100).sum(),)
    losses.sum().backward()
    for name, param in model.named_parameters():
        assert (param.grad is not None) == param.requires_grad, name
        if param.requires_grad:
            assert param.grad.isfinite().all(), name
    if not losses.numel():
        assert all(grad.abs().max() == 0 for grad in _gradients(model).values())
    if not batch.layout.images and "adapter" not in frozen:
        assert all(param.grad.abs().max() == 0 for param in model.adapter.parameters())


def test_frozen_encoder_without_images_is_not_run():
    model, batch = tiny_model(), make_batch([9])
    model.vision_model.requires_grad_(False)
    model.adapter.requires_grad_(False)
    model.vision_model.forward = None  # calling it would raise
    assert model(batch).numel() > 0


def test_frozen_encoder_builds_no_graph():
    model, batch = tiny_model(), make_batch([9], [(3,)])
    model.vision_model.requires_grad_(False)
    features = []
    model.vision_model.register_forward_hook(lambda module, args, out: features.append(out))
    model(batch)
    assert not features[0].requires_grad


def test_padding_rows_change_nothing():
    model, batch = tiny_model(), make_batch([9, 5], [(3,), ()])
    padded = make_batch([9, 5], [(3,), ()])
    padded.input_ids[14:] = 5
    assert torch.equal(model(batch), model(padded))


def test_bf16_stays_close_to_fp32():
    batch = make_batch([9, 5, 8], [(3,), (), (0, 5)])
    loss, grads = _loss_and_gradients(tiny_model(), [batch])
    model = tiny_model(precision="bf16")
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    loss_bf16, grads_bf16 = _loss_and_gradients(model, [batch])
    assert loss_bf16.dtype == torch.float32
    # BF16 keeps 8 bits; rounding errors of some 40 operations in a row add up to a few per cent.
    torch.testing.assert_close(loss_bf16, loss, rtol=0.05, atol=0.05)
    for name, grad in grads.items():
        difference = (grads_bf16[name].float() - grad).norm() / grad.norm().clamp_min(1e-3)
        assert difference < 0.2, name


def test_wrong_number_of_images_is_caught():
    batch = make_batch([9], [(3,)])
    batch.pixel_values = batch.pixel_values.repeat(2, 1, 1, 1)
    with pytest.raises(AssertionError, match=r"18 visual rows .* the layout has 9"):
        tiny_model()(batch)

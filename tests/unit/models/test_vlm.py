"""The whole model in one process: independent of packing, complete graphs."""

import pytest
import torch
from torch import Tensor

from megatron_dattn.attention import PRESETS
from megatron_dattn.models.execution import ExactSavings
from megatron_dattn.models.vlm import DAttnVLM
from tests.support.vlm import (
    join_tokens,
    make_batch,
    tiny_model,
    tiny_model_config,
)

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("preset", ["dattn", "dattn_biased"])
def test_a_visual_token_never_changes_another_one(preset):
    """At every layer: what diagonal V2V attention promises."""
    every_token = ExactSavings(unread_tokens=False)
    model = tiny_model(tiny_model_config(preset), savings=every_token)
    batch = make_batch([6, 4], [(2, 2), (1,)])
    states: list[Tensor] = []
    for layer in model.language_model.decoder.layers:
        layer.register_forward_hook(lambda module, args, out: states.append(out[0]))
    with torch.no_grad():
        tokens = join_tokens(model, batch)
        attention = model.attention_inputs(batch.layout, tokens.device)
        model.language_model(tokens, attention)
        changed = tokens.clone()
        changed[7] += 1.0
        model.language_model(changed, attention)
    for before, after in zip(states[:2], states[2:], strict=True):
        moved = (before != after).flatten(1).any(1).nonzero().squeeze(1).tolist()
        visual = [token for token in moved if token < batch.layout.visual_budget]
        text = [token for token in moved if token >= batch.layout.visual_budget]
        assert visual == [7]
        assert text == list(range(*batch.layout.text_tokens(0)))  # all text of its sample, no other


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


@pytest.mark.parametrize("preset", ["dattn", "s_attn", "dattn_cascade", "saisa", "yopo"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(preset, recompute):
    config = tiny_model_config(preset)
    batch = make_batch([9, 5, 8], [(3,), (), (0, 5)], grid=config.image_grid)
    loss, grads = _loss_and_gradients(tiny_model(config), [batch])
    again, grads_again = _loss_and_gradients(tiny_model(config, recompute=recompute), [batch])
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


def test_padding_tokens_change_nothing():
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
    with pytest.raises(AssertionError, match=r"18 visual tokens .* the layout has 9"):
        tiny_model()(batch)


@pytest.mark.parametrize("labelled_logits", [True, False])
def test_the_order_in_which_tokens_pass_moves_nothing(labelled_logits: bool) -> None:
    savings = ExactSavings(labelled_logits=labelled_logits)
    model = tiny_model(tiny_model_config("s_attn"), savings=savings).double()
    batch = make_batch([9, 7, 4], [(2, 2), (), (0, 4)], budgets=(40, 24))
    assert model.knows_one_kind
    found = []
    for one_kind in (True, False):
        model.knows_one_kind = one_kind
        losses = model(batch)
        gradients = torch.autograd.grad(losses.sum(), list(model.parameters()))
        found.append([losses, *gradients])
    for in_reading_order, packed in zip(*found, strict=True):
        # Float64 sums in another order.
        torch.testing.assert_close(in_reading_order, packed, rtol=1e-9, atol=1e-12)

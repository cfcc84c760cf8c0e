"""The language part: equal to Hugging Face's Mistral, with a head that runs on chosen tokens."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tests.support.vlm import LANGUAGE, load_hugging_face, make_batch, tiny_model, tiny_model_config

pytestmark = pytest.mark.usefixtures("one_process")


def _mistral(tie: bool = False) -> MistralForCausalLM:
    torch.manual_seed(11)
    return MistralForCausalLM(
        MistralConfig(
            hidden_size=LANGUAGE.hidden_size,
            num_hidden_layers=LANGUAGE.num_hidden_layers,
            num_attention_heads=LANGUAGE.num_attention_heads,
            num_key_value_heads=LANGUAGE.num_key_value_heads,
            head_dim=LANGUAGE.head_dim,
            intermediate_size=LANGUAGE.intermediate_size,
            vocab_size=LANGUAGE.vocab_size,
            rms_norm_eps=LANGUAGE.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": LANGUAGE.rope_theta},
            sliding_window=None,
            initializer_range=0.2,  # larger than usual, so that attention is not almost uniform
            tie_word_embeddings=tie,
        )
    )


@pytest.mark.parametrize("preset", ["s_attn", "dattn"])
@pytest.mark.parametrize("tie", [False, True])
def test_text_only_logits_equal_mistral(preset, tie):
    """Without images every preset is the language model itself."""
    theirs = _mistral(tie)
    ours = tiny_model(tiny_model_config(preset, tie_word_embeddings=tie))
    load_hugging_face(ours, text=theirs.state_dict())
    batch = make_batch([9, 1, 14])
    for sample in range(3):
        start, end = batch.layout.text_tokens(sample)
        budget = batch.layout.visual_budget
        with torch.no_grad():
            logits = ours.forward_logits(batch, torch.arange(start, end))
            expected = theirs(batch.input_ids[None, start - budget : end - budget]).logits[0]
        # fp32 sums in another order, through two layers.
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_losses_are_the_cross_entropy_of_the_labelled_tokens():
    model, batch = tiny_model(), make_batch([9, 5], [(2,)])
    losses = model(batch)
    labelled = batch.labels != -100
    tokens = labelled.nonzero().squeeze(1) + batch.layout.visual_budget
    logits = model.forward_logits(batch, tokens)
    expected = torch.nn.functional.cross_entropy(logits, batch.labels[labelled], reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)


def test_tokens_before_an_image_hand_their_prediction_to_it_where_text_sees_backwards_only():
    model, batch = tiny_model(tiny_model_config("s_attn")), make_batch([6], [(3,)])
    batch.labels.fill_(-100)
    batch.labels[2] = 7  # the text token just before the image
    tokens = torch.tensor([batch.layout.image_tokens[0][1] - 1])
    expected = -model.forward_logits(batch, tokens).log_softmax(-1)[0, 7]
    torch.testing.assert_close(model(batch)[0], expected)

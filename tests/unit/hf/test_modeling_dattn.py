"""An export loaded by transformers computes what the training code computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_dattn.attention.layers import output_tokens
from megatron_dattn.hf import attention_dattn
from megatron_dattn.hf.caches_dattn import DAttnCache
from megatron_dattn.hf.modeling_dattn import DAttnForConditionalGeneration
from megatron_dattn.hf.processing_dattn import DAttnProcessor
from megatron_dattn.inference import Prompt, generate_tokens, load_model
from megatron_dattn.inference.prompt import pack_prompts
from megatron_dattn.runtime.distributed import destroy_distributed
from tests.unit.hf.conftest import CASES, IMAGES, QUESTIONS, messages

ANSWER = Path(__file__).with_name("answer.py")
IMAGE_ID = 5  # `[control_8]` of the tiny tokenizer


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    yield
    destroy_distributed()


def our_prompts(loaded, base):
    return [
        Prompt.from_question(loaded, question, [base / f"{number}.png" for number in numbers])
        for question, numbers in zip(QUESTIONS, IMAGES, strict=True)
    ]


@torch.inference_mode()
def our_logits(loaded, prompt):
    """At every text token, [text tokens, vocabulary]."""
    batch = pack_prompts(loaded, [(prompt, [])])
    dtype = next(loaded.model.parameters()).dtype
    batch.pixel_values = batch.pixel_values.to(dtype)
    return loaded.model.forward_logits(batch, output_tokens(batch.layout, loaded.model.attention))


@pytest.fixture
def opened(exported):
    """Model and processor of an export, loaded in this process.

    The implementation is the decoder's alone: SigLIP's eager attention rounds to fp32.
    """

    def load(case, implementation="sdpa"):
        _, folder = exported(case)
        model, report = DAttnForConditionalGeneration.from_pretrained(
            folder,
            output_loading_info=True,
            attn_implementation={"": implementation, "vision_config": "sdpa"},
        )
        assert not any(report.values()), "all that is there, and nothing else"
        return model.eval(), DAttnProcessor.from_pretrained(folder)

    return load


def inputs_of(processor, conversations):
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


@pytest.fixture(scope="module")
def answers(base, exported):
    """Of every case, from one process that knows nothing of this project."""
    environment = {
        "PATH": os.environ["PATH"],
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(base / "modules"),
    }
    folders = [exported(case)[1] for case in CASES]
    call = [sys.executable, ANSWER, base / "questions.json", base / "answers.pt", *folders]
    done = subprocess.run(call, cwd=base, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, torch.load(base / "answers.pt"), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_answers_alike(base, exported, answers, case):
    run, _ = exported(case)
    loaded = load_model(run)
    prompts = our_prompts(loaded, base)
    tokens = generate_tokens(loaded, prompts, max_new_tokens=12)
    for prompt, expected, answer in zip(prompts, tokens, answers[case], strict=True):
        is_text = answer["ids"] != IMAGE_ID
        assert answer["ids"][is_text].tolist() == prompt.tokens.input_ids
        places = (is_text.cumsum(0))[~is_text].tolist()
        assert tuple(places) == prompt.tokens.image_offsets
        # fp32 with another order of operations; logits are of the order of 5.
        logits = our_logits(loaded, prompt)
        torch.testing.assert_close(answer["logits"][is_text], logits, rtol=1e-4, atol=1e-4)
        assert answer["tokens"].tolist() == expected


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_double_precision_shows_the_same_function(base, exported, opened, case, implementation):
    run, _ = exported(case)
    model, processor = opened(case, implementation)
    model = model.double()
    loaded = load_model(run)
    loaded.model.double()
    conversations = messages(base)
    for prompt, conversation in zip(our_prompts(loaded, base), conversations, strict=True):
        inputs = inputs_of(processor, [conversation])
        if prompt.images:
            expected_pixels = loaded.preprocessor.normalise(list(prompt.images))
            # One resizes bytes and scales in one step, the other in two: fp32 rounding.
            torch.testing.assert_close(inputs["pixel_values"], expected_pixels, atol=1e-6, rtol=0)
            inputs["pixel_values"] = expected_pixels.double()
        with torch.inference_mode():
            logits = model(**inputs).logits[0]
        is_text = inputs["input_ids"][0] != IMAGE_ID
        # Both round in fp64; what is left of 16 digits after two layers is far above ten.
        torch.testing.assert_close(
            logits[is_text], our_logits(loaded, prompt), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("case", CASES)
def test_a_padded_batch_equals_its_prompts_alone(base, opened, case):
    model, processor = opened(case)
    conversations = messages(base)
    inputs = inputs_of(processor, conversations)
    assert inputs["attention_mask"][:, -1].all(), "padding stands on the left"
    with torch.inference_mode():
        together = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    for index, conversation in enumerate(conversations):
        alone = inputs_of(processor, [conversation])
        columns = alone["input_ids"].shape[1]
        with torch.inference_mode():
            logits = model(**alone).logits[0]
        is_text = alone["input_ids"][0] != IMAGE_ID
        # fp32 sums of other lengths.
        torch.testing.assert_close(
            together[index, -columns:][is_text], logits[is_text], rtol=1e-4, atol=1e-4
        )
        answer = model.generate(**alone, max_new_tokens=8)[0, columns:].tolist()
        assert tokens[index].tolist()[: len(answer)] == answer


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("dattn_sum", "vidi")])
def test_cached_decoding_equals_the_full_forward(base, opened, case):
    model, processor = opened(case)
    inputs = inputs_of(processor, messages(base))
    more = torch.randint(6, 37, (len(QUESTIONS), 5), generator=torch.Generator().manual_seed(0))
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(more)), 1)
    with torch.inference_mode():
        ids = torch.cat((inputs["input_ids"], more), 1)
        full = model(ids, inputs["pixel_values"], attention_mask=mask).logits[:, -5:]
        outputs = model(**inputs, use_cache=True)
        steps = []
        for column in more.split((1, 3, 1), dim=1):
            outputs = model(column, past_key_values=outputs.past_key_values, use_cache=True)
            steps.append(outputs.logits)
    # fp32, other shapes of the same matrix products.
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-4)
    without = model.generate(**inputs, max_new_tokens=6, use_cache=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), without)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["dattn", "dattn_biased", "dattn_sigmoid", "dattn_cascade"])
def test_blocks_of_rows_bound_the_scores_and_change_nothing(
    base, opened, monkeypatch, case, implementation
):
    model, processor = opened(case, implementation)
    model = model.double()
    inputs = inputs_of(processor, messages(base))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.inference_mode():
        whole = model(**inputs).logits
        sizes = []
        record_scores(monkeypatch, sizes)
        monkeypatch.setattr(attention_dattn, "MAX_SCORES", 3000)
        blocks = model(**inputs).logits
    assert max(sizes) <= 3000
    # fp64, sums of the same terms.
    torch.testing.assert_close(blocks, whole, rtol=1e-10, atol=1e-10)


def record_scores(monkeypatch, sizes):
    """Note how many scores each softmax of the decoder is over, explicit or torch's."""
    explicit, fused = attention_dattn._softmax, torch.nn.functional.scaled_dot_product_attention

    def softmax(scores, seen):
        sizes.append(scores.numel())
        return explicit(scores, seen)

    def attention(query, key, value, attn_mask=None, **options):
        if attn_mask is not None:  # the vision encoder's has none
            sizes.append(query.shape[:3].numel() * key.shape[2])
        return fused(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(attention_dattn, "_softmax", softmax)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)


def test_prompts_are_fused_and_single_tokens_are_not(base, opened, monkeypatch):
    model, processor = opened("dattn")
    inputs = inputs_of(processor, messages(base))
    usual_softmax, usual_fused = attention_dattn._softmax, attention_dattn.Projections._fused
    explicit, fused = [], []

    def softmax(scores, seen):
        explicit.append(scores.shape[3])
        return usual_softmax(scores, seen)

    def fused_attention(self, query, *arguments):
        fused.append(query.shape[2])
        return usual_fused(self, query, *arguments)

    monkeypatch.setattr(attention_dattn, "_softmax", softmax)
    monkeypatch.setattr(attention_dattn.Projections, "_fused", fused_attention)
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    layers = model.config.text_config.num_hidden_layers
    assert fused == [inputs["input_ids"].shape[1]] * layers
    assert explicit == [1] * (2 * layers)


@pytest.mark.parametrize("case", ["dattn_biased", "dattn_cascade", "saisa"])
def test_images_are_encoded_once_for_many_prompts(base, opened, monkeypatch, case):
    model, processor = opened(case)
    questions = [[m] for m in (messages(base)[1][0], messages(base)[3][0])]
    inputs = inputs_of(processor, questions)
    pixels = inputs.pop("pixel_values")
    expected = model.generate(**inputs, pixel_values=pixels, max_new_tokens=8)
    images = model.encode_images(pixels)

    def fail(*arguments):
        raise AssertionError("the vision encoder ran again")

    monkeypatch.setattr(model.model, "encode_images", fail)
    assert torch.equal(model.generate(**inputs, image_cache=images, max_new_tokens=8), expected)
    swapped = {name: value.flip(0) for name, value in inputs.items()}
    answers = model.generate(**swapped, image_cache=images.select([1, 0]), max_new_tokens=8)
    assert torch.equal(answers, expected.flip(0))


def test_several_prompts_share_one_image(base, opened):
    model, processor = opened("dattn")
    image, question = messages(base)[1][0]["content"]
    questions = [[{"role": "user", "content": [image, {**question, "text": t}]}] for t in "ab"]
    inputs = inputs_of(processor, questions)
    pixels = inputs.pop("pixel_values")
    expected = model.generate(**inputs, pixel_values=pixels, max_new_tokens=8)
    images = model.encode_images(pixels[:1]).select([0, 0])
    assert torch.equal(model.generate(**inputs, image_cache=images, max_new_tokens=8), expected)


@pytest.mark.parametrize("case", ["dattn-gemma2", "saisa"])
def test_a_model_saved_by_transformers_stays_the_same(base, opened, tmp_path, case):
    model, processor = opened(case)
    model.save_pretrained(tmp_path)
    again = DAttnForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = inputs_of(processor, messages(base))
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_repeated_samples_take_their_images_along(base, opened):
    model, processor = opened("dattn")
    inputs = inputs_of(processor, messages(base)[1:])
    beams = model.generate(**inputs, max_new_tokens=5, num_beams=3, num_return_sequences=1)
    for index, conversation in enumerate(messages(base)[1:]):
        alone = inputs_of(processor, [conversation])
        answer = model.generate(**alone, max_new_tokens=5, num_beams=3)[0]
        new = answer[alone["input_ids"].shape[1] :].tolist()
        assert beams[index, inputs["input_ids"].shape[1] :].tolist()[: len(new)] == new


@pytest.mark.parametrize("case", ["dattn", "dattn_biased", "dattn_tanh"])
def test_guessed_tokens_that_are_rejected_leave_no_trace(base, opened, case):
    model, processor = opened(case)
    inputs = inputs_of(processor, [messages(base)[2]])
    expected = model.generate(**inputs, max_new_tokens=12)
    guessed = model.generate(**inputs, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(guessed, expected)


def test_a_cropped_cache_goes_on_as_if_it_had_not_seen_more(base, opened):
    model, processor = opened("dattn_biased")
    inputs = inputs_of(processor, messages(base))
    more = torch.tensor([[7, 8, 9]] * len(QUESTIONS))
    with torch.inference_mode():
        cache = model(**inputs, use_cache=True).past_key_values
        expected = model(more[:, :1], past_key_values=cache, use_cache=True).logits
        model(more[:, 1:], past_key_values=cache, use_cache=True)
        cache.crop(-more.shape[1])
        again = model(more[:, :1], past_key_values=cache, use_cache=True).logits
    assert torch.equal(again, expected)


def test_loss_skips_images_padding_and_sample_borders(base, opened):
    model, processor = opened("dattn")
    inputs = inputs_of(processor, messages(base))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    together = model(**inputs, labels=labels).loss
    total, count = 0.0, 0
    for conversation in messages(base):
        alone = inputs_of(processor, [conversation])
        is_text = alone["input_ids"][0] != IMAGE_ID
        logits = model(**alone).logits[0][is_text]
        targets = alone["input_ids"][0][is_text][1:]
        total += torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum")
        count += len(targets)
    # A mean of some fifty terms in fp32.
    torch.testing.assert_close(together, total / count, rtol=1e-5, atol=1e-6)
    together.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_wrong_use_is_refused(base, opened):
    model, processor = opened("dattn")
    inputs = inputs_of(processor, [messages(base)[2]])
    with pytest.raises(ValueError, match="2 <image> tokens, but 1 images"):
        model(inputs["input_ids"], inputs["pixel_values"][:1])
    cache = model(**inputs, use_cache=True).past_key_values
    assert isinstance(cache, DAttnCache)
    with pytest.raises(ValueError, match="start anew"):
        model(torch.tensor([[IMAGE_ID]]), inputs["pixel_values"][:1], past_key_values=cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge": "product"}, "merge='product'; choose one of"),
        ({"merge": "cascade", "t2v_rotary": True, "visual_positions": "sequence"}, "unset t2v"),
        ({"visual_source": "reproject"}, "leaves visual tokens no state"),
        ({"t2v_rotary": True}, "visual_positions='sequence'"),
        ({"text_config": {"model_type": "gpt2"}}, "'gpt2'; this code knows mistral, llama"),
        ({"vision_config": {"model_type": "vit"}}, "'vit'; this code knows siglip_vision_model"),
    ],
)
def test_unknown_configurations_are_refused(exported, change, message):
    _, folder = exported("dattn")
    config = json.loads((folder / "config.json").read_text())
    from megatron_dattn.hf.configuration_dattn import DAttnConfig

    with pytest.raises(ValueError, match=message):
        DAttnConfig(**{**config, **change})

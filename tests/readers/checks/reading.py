"""Loading an export, and what it says to one prompt or to a batch of them."""

from typing import Any

import torch
import transformers
from checks.given import REMOTE, Given, NotSupported, Refused, assert_close
from transformers.modeling_outputs import CausalLMOutputWithPast


def load(given: Given) -> None:
    """The Auto classes take the folder, and every weight has its place."""
    folder = given.folder
    config = transformers.AutoConfig.from_pretrained(folder, **REMOTE)
    assert config.model_type == ("llava" if given.is_stock else "dattn"), config.model_type
    transformers.AutoTokenizer.from_pretrained(folder, **REMOTE)
    _load_all_weights(given, transformers.AutoModelForImageTextToText)


def load_without_head(given: Given) -> None:
    """So does AutoModel."""
    if given.is_stock and transformers.__version__.startswith("4."):
        _, report = transformers.AutoModel.from_pretrained(given.folder, output_loading_info=True)
        assert any(name.startswith("model.") for name in report["unexpected_keys"]), report
        raise NotSupported(
            "transformers 4 looks for weights without `model.` in front of their names and warns "
            "that it found none; use AutoModelForImageTextToText"
        )
    _load_all_weights(given, transformers.AutoModel)


def _load_all_weights(given: Given, auto: Any) -> None:
    _, report = auto.from_pretrained(given.folder, output_loading_info=True, **REMOTE)
    unread = {name for name in report["unexpected_keys"] if name != "lm_head.weight"}
    assert not unread, f"{auto.__name__}: {unread}"
    assert not report["missing_keys"], f"{auto.__name__}: {report}"
    assert not report["mismatched_keys"], f"{auto.__name__}: {report}"


def inputs(given: Given) -> None:
    """Template and processor make the ids and pixels of training, in one step and in two."""
    options = {"add_generation_prompt": True}
    text = given.processor.apply_chat_template(_chat(given, {}), tokenize=False, **options)
    two = given.processor(images=given.picture(0), text=text, return_tensors="pt")
    chat = _chat(given, {"path": str(given.folder.parent / "0.png")})
    one = given.processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    expected = given.ids({"ids": given.expected["question_ids"]})
    for way, found in (("one step", one), ("two steps", two)):
        ids = found["input_ids"][0].tolist()
        assert ids == expected, f"{way}: {ids} in place of {expected}"
        # Bytes are scaled in one step or in two: fp32 rounding.
        assert_close(found["pixel_values"], given.expected["pixels"][:1], way, rtol=0, atol=1e-6)


def _chat(given: Given, image: dict[str, str]) -> list[dict[str, Any]]:
    """A question about a picture; made anew for each call, as some versions edit it."""
    content = [{"type": "image", **image}, {"type": "text", "text": given.expected["question"]}]
    return [{"role": "user", "content": content}]


def logits(given: Given) -> None:
    """What follows each text token, wherever the images stand, is what our own model says."""
    image = given.expected["image_id"]
    for prompt in given.prompts:
        batch = given.batch([prompt])
        with torch.inference_mode():
            found = given.model(**batch).logits[0]
        ids = batch["input_ids"][0]
        text = (ids != image).nonzero()[:, 0].tolist()
        answering = [column - 1 for column in text[1:]] + [len(ids) - 1]
        # fp32 with another order of operations; logits are of the order of 5.
        assert_close(found[answering], prompt["logits"], prompt["name"], rtol=1e-4, atol=1e-4)


def greedy(given: Given) -> None:
    """Every prompt alone is answered as by our own generator."""
    for prompt in given.prompts:
        (tokens,) = given.generate([prompt])
        assert tokens == prompt["tokens"], (prompt["name"], tokens, prompt["tokens"])


def padded(given: Given) -> None:
    """So is a batch of all of them, padded on the left."""
    answers = given.generate(given.prompts)
    assert answers == [prompt["tokens"] for prompt in given.prompts], answers


def sampling(given: Given) -> None:
    """A seed draws the same tokens with and without a cache, and not always the likeliest."""
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options = {"do_sample": True, "temperature": 1.5, "use_cache": use_cache}
        drawn.append(given.generate(given.prompts, **options))
    assert drawn[0] == drawn[1], drawn
    assert drawn[0] != [prompt["tokens"] for prompt in given.prompts]


def beams(given: Given) -> None:
    """Beams of a batch are those of its prompts alone, with and without a cache."""
    together = given.generate(given.prompts, num_beams=3)
    alone = [given.generate([prompt], num_beams=3)[0] for prompt in given.prompts]
    assert together == alone, (together, alone)
    without = given.generate(given.prompts, num_beams=3, use_cache=False)
    assert together == without, (together, without)


def dynamic_cache(given: Given) -> None:
    """Going on from a cache, by one token and by several, equals the whole forward pass."""
    name = _cache_name()
    batch = given.batch(given.prompts)
    more = torch.tensor([[309, 308, 307, 320]] * len(given.prompts))
    mask = torch.cat((batch["attention_mask"], torch.ones_like(more)), 1)
    batch |= {"input_ids": torch.cat((batch["input_ids"], more), 1), "attention_mask": mask}
    with torch.inference_mode():
        whole = given.model(**batch, **_positions(given, mask)).logits[:, -4:]
        prompt, memory, steps = batch["input_ids"].shape[1] - 4, {}, []
        for start, end in ((0, prompt), (prompt, prompt + 1), (prompt + 1, prompt + 4)):
            pixels = {"pixel_values": batch["pixel_values"]} if start == 0 else {}
            places = _positions(given, mask[:, :end], start)
            outputs = given.model(
                input_ids=batch["input_ids"][:, start:end],
                attention_mask=mask[:, :end],
                use_cache=True,
                **memory,
                **pixels,
                **places,
            )
            memory = {name: outputs[name]}
            steps.append(outputs.logits)
        steps = steps[1:]
    # fp32, other shapes of the same matrix products.
    assert_close(torch.cat(steps, 1), whole, "going on", rtol=1e-3, atol=1e-3)


def _positions(given: Given, mask: torch.Tensor, start: int = 0) -> dict[str, torch.Tensor]:
    """Those of the columns from `start` on, for a stock model, which else counts padding too."""
    if not given.is_stock:
        return {}
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, start:]}


def _cache_name() -> str:
    names = CausalLMOutputWithPast.__dataclass_fields__
    return "cache" if "cache" in names else "past_key_values"


def static_cache(given: Given) -> None:
    """A cache of fixed size answers alike; code of ours, which has none, says so."""
    options = {"cache_implementation": "static", "disable_compile": True}
    if given.is_stock:
        answers = given.generate(given.prompts, **options)
        assert answers == [prompt["tokens"] for prompt in given.prompts], answers
        return
    try:
        given.generate(given.prompts, **options)
    except ValueError as error:
        if "DAttnCache" not in str(error):
            raise
        raise Refused("text and images are kept in a cache of the model's own") from None
    raise AssertionError("a static cache was taken, and another one used")


def pipeline(given: Given) -> None:
    """`pipeline("image-text-to-text")` answers a chat message about a picture."""
    chat = _chat(given, {"path": str(given.folder.parent / "0.png")})
    pipe = transformers.pipeline(
        "image-text-to-text", model=given.model, processor=given.processor, device="cpu"
    )
    (answer,) = pipe(
        text=chat,
        max_new_tokens=given.new_tokens,
        return_full_text=False,
    )
    tokens = given.expected["question_tokens"]
    expected = given.processor.decode(tokens, skip_special_tokens=True)
    found = answer["generated_text"]
    assert found.strip() == expected.strip(), (found, expected)


def save(given: Given) -> None:
    """What a reader saves, weights, code and processor, is the same model."""
    target = given.scratch / "saved"
    given.model.save_pretrained(target)
    given.processor.save_pretrained(target)
    again = given.fresh_model(target)
    transformers.AutoProcessor.from_pretrained(target, **REMOTE)
    batch = given.batch(given.prompts)
    with torch.inference_mode():
        assert torch.equal(again(**batch).logits, given.model(**batch).logits)

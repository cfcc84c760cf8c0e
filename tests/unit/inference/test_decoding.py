"""A token at a time gives what the whole pack gives, for every preset and every kind of prompt."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.layers import output_tokens
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.template import TextTokens
from megatron_dattn.errors import ConfigError
from megatron_dattn.inference import LoadedModel, Prompt, encode_images, generate_tokens
from megatron_dattn.inference.decoding import Decoding
from megatron_dattn.inference.prompt import pack_prompts
from megatron_dattn.models.vlm import ImageFeatures
from megatron_dattn.runtime.distributed import destroy_distributed
from tests.support.megatron import init_model_parallel
from tests.support.vlm import VISION, tiny_model, tiny_model_config
from tests.unit.attention.support import VARIANTS

LAYERS = 4  # so that some layers freeze, and some see no image any more
ALONE = [name for name, config in PRESETS.items() if not config.scores_visual_tokens]
# Text tokens of each prompt, and how many of them stand before each of its images.
PROMPTS: dict[str, list[tuple[int, tuple[int, ...]]]] = {
    "text only": [(6, ())],
    "one image": [(6, (1,))],
    "image in the middle": [(9, (4,))],
    "image at the end": [(3, (3,))],
    "several images": [(7, (0, 3, 3))],
    "mixed pack": [(6, ()), (8, (4,)), (7, (1, 1)), (3, (3,)), (1, ())],
}
IMAGE_ID = 63  # the last entry of the vocabulary


@pytest.fixture(scope="module", autouse=True)
def one_process():
    init_model_parallel()
    yield
    destroy_distributed()


def loaded_model(preset: str, **language: Any) -> LoadedModel:
    """A tiny model in float64 with as much of a tokenizer as generation asks for."""
    model = tiny_model(tiny_model_config(preset, num_hidden_layers=LAYERS, **language))
    preprocessor = ImagePreprocessor(image_size=VISION.image_size)
    tokenizer: Any = SimpleNamespace(eos_token_id=-1, convert_tokens_to_ids=lambda token: IMAGE_ID)
    conversations: Any = SimpleNamespace(template="mistral_v3", end_token=None)
    config: Any = None
    return LoadedModel(tokenizer, conversations, preprocessor, config, model.double().eval())


def picture(number: int) -> np.ndarray:
    side = VISION.image_size
    return np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8)


def make_prompts(kinds: list[tuple[int, tuple[int, ...]]]) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for number, (length, offsets) in enumerate(kinds):
        ids = torch.randint(0, 64, (length,), generator=generator).tolist()
        images = tuple(picture(10 * number + place) for place in range(len(offsets)))
        prompts.append(Prompt(TextTokens(ids, [-100] * length, offsets), images))
    return prompts


@torch.inference_mode()
def whole_pack(loaded: LoadedModel, samples: list[tuple[Prompt, list[int]]]) -> Tensor:
    """Next-token logits by the forward pass of training over everything said so far."""
    batch = pack_prompts(loaded, samples)
    last = torch.tensor(batch.layout.text_cu_seqlens[1:]) - 1
    return loaded.model.forward_logits(
        batch, output_tokens(batch.layout, loaded.model.attention)[last]
    )


@torch.inference_mode()
def assert_same(loaded: LoadedModel, prompts: list[Prompt]) -> None:
    """Five tokens, the second prompt pausing after two of them for good."""
    plain = [replace(prompt, images=tuple(prompt.pixels)) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    decoding = Decoding(loaded, prompts)
    logits = decoding.prefill()
    for step in range(5):
        expected = whole_pack(loaded, [(plain[i], answers[i]) for i in running])
        # float64 sums in another order; logits are about 1.
        torch.testing.assert_close(logits, expected, atol=1e-12, rtol=1e-12)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        for i, token in zip(running, logits.argmax(-1).tolist(), strict=True):
            answers[i].append(token)
        running = [i for i in running if step < 1 or i != 1]
        logits = decoding.decode_step(running, [answers[i][-1] for i in running])


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_token_at_a_time_is_the_whole_pack(preset: str, kind: str) -> None:
    assert_same(loaded_model(preset), make_prompts(PROMPTS[kind]))


@pytest.mark.parametrize("preset", ["dattn", "dattn_cascade", "s_attn", "s_attn_debias", "yopo"])
def test_with_windows_softcap_and_norms_behind(preset: str) -> None:
    """Gemma-2: a window of five tokens in every second layer."""
    assert_same(loaded_model(preset, family="gemma2"), make_prompts(PROMPTS["mixed pack"]))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("preset", PRESETS)
def test_with_biases_and_norms_of_queries_and_keys(preset: str, family: str) -> None:
    assert_same(loaded_model(preset, family=family), make_prompts(PROMPTS["mixed pack"]))


@pytest.mark.parametrize("name", [name for name in VARIANTS if "inherit" in name])
def test_images_fall_out_of_an_inherited_window(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do so while the answer grows, and in the layers with a window alone."""
    monkeypatch.setitem(PRESETS, name, VARIANTS[name])
    assert_same(loaded_model(name, family="gemma2"), make_prompts(PROMPTS["mixed pack"]))


@pytest.mark.parametrize("name", ["exit", "shortv"])
def test_a_frozen_layer_s_window_goes_on_counting_images(name: str) -> None:
    assert_same(
        loaded_model(name, family="mistral", sliding_window=5), make_prompts(PROMPTS["mixed pack"])
    )


@pytest.mark.parametrize("kind", [kind for kind in PROMPTS if kind != "text only"])
@pytest.mark.parametrize("preset", ALONE)
def test_kept_images_give_the_same(preset: str, kind: str) -> None:
    loaded = loaded_model(preset)
    prompts = make_prompts(PROMPTS[kind])
    arrays = [image for prompt in prompts for image in prompt.images]
    # Encoded together and in another order than they are used.
    kept = iter(encode_images(loaded, arrays[::-1])[::-1])
    assert_same(loaded, [replace(p, images=tuple(next(kept) for _ in p.images)) for p in prompts])


@pytest.mark.parametrize("preset", ["dattn", "dattn_biased", "dattn_cascade", "saisa"])
def test_prompts_share_a_kept_image(preset: str) -> None:
    """At different places, beside an image that is not kept, and twice in one prompt."""
    loaded = loaded_model(preset)
    (kept,) = encode_images(loaded, [picture(0)])
    kinds = [(5, (1,)), (6, (4,)), (7, (0, 3)), (4, (2, 2))]
    images = [(kept,), (kept,), (picture(1), kept), (kept, kept)]
    prompts = [
        replace(prompt, images=own) for prompt, own in zip(make_prompts(kinds), images, strict=True)
    ]
    assert_same(loaded, prompts)


def count_encodings(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each later call of the vision encoder gets."""
    sizes: list[int] = []
    encode = loaded.model.encode

    def counted(pixels: Tensor) -> ImageFeatures | None:
        sizes.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(loaded.model, "encode", counted)
    return sizes


def test_an_image_is_encoded_once_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_model("dattn")
    sizes = count_encodings(loaded, monkeypatch)
    prompts = [replace(p, images=(picture(0),)) for p in make_prompts([(5, (1,)), (4, (0,))])]
    prompts += make_prompts([(5, (1,)), (3, ())])  # the first shows that picture too
    prompts[2] = replace(prompts[2], images=(picture(3),))
    generate_tokens(loaded, prompts, max_new_tokens=3)
    assert sizes == [2]


def test_a_kept_image_is_not_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_model("dattn")
    (kept,) = encode_images(loaded, [picture(0)])
    sizes = count_encodings(loaded, monkeypatch)
    (prompt,) = make_prompts([(5, (1,))])
    expected = generate_tokens(loaded, [prompt], max_new_tokens=3)
    assert sizes == [1]
    again = generate_tokens(loaded, [replace(prompt, images=(kept,))], max_new_tokens=3)
    assert (again, sizes) == (expected, [1])


def test_images_that_read_text_cannot_be_kept() -> None:
    with pytest.raises(ConfigError, match=r"'s_attn' lets visual tokens attend to other tokens"):
        encode_images(loaded_model("s_attn"), [picture(0)])


def test_another_models_images_are_refused() -> None:
    loaded, other = loaded_model("dattn"), loaded_model("dattn")
    (prompt,) = make_prompts([(5, (1,))])
    with pytest.raises(ConfigError, match="another model"):
        generate_tokens(loaded, [replace(prompt, images=encode_images(other, prompt.images))])


def test_the_memory_of_a_kept_image_is_what_the_documentation_says() -> None:
    loaded = loaded_model("dattn")
    (kept,) = encode_images(loaded, [picture(0)])
    language = loaded.model.model_config.language
    numbers = 2 * 9 * language.num_key_value_heads * language.head_dim
    assert kept.num_bytes == LAYERS * numbers * 8
    assert encode_images(loaded, []) == ()


def test_no_prompts_and_no_tokens() -> None:
    loaded = loaded_model("dattn")
    assert generate_tokens(loaded, []) == []
    assert generate_tokens(loaded, make_prompts([(3, ())]), max_new_tokens=0) == [[]]

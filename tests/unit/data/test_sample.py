"""Putting encoded samples into one pack."""

import numpy as np
import pytest
import torch

from megatron_dattn.attention.layout import ImageSpan
from megatron_dattn.batch import PackedBatch
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.sample import EncodedSample, build_batch

PREPROCESSOR = ImagePreprocessor(image_size=4)


def sample(key: str, length: int, image_offsets: tuple[int, ...] = ()) -> EncodedSample:
    ids = np.arange(1, length + 1) + 10 * ord(key)
    return EncodedSample(
        key,
        position=0,
        epoch=0,
        input_ids=ids,
        labels=np.append(ids[1:], -100),
        image_offsets=image_offsets,
        images=[np.full((4, 4, 3), 5 * ord(key) % 256, np.uint8) for _ in image_offsets],
        grid=(2, 1),
    )


def batch_of(*samples: EncodedSample, visual_budget: int = 8) -> PackedBatch:
    return build_batch(
        samples,
        preprocessor=PREPROCESSOR,
        visual_budget=visual_budget,
        text_budget=12,
        pad_id=7,
    )


def test_samples_follow_each_other_and_the_rest_is_padding() -> None:
    a, b, c = sample("a", 3, (1,)), sample("b", 2), sample("c", 4, (0, 4))
    batch = batch_of(a, b, c)
    assert batch.layout.text_lengths == (3, 2, 4)
    assert batch.layout.images == (
        ImageSpan(0, 1, (2, 1)),
        ImageSpan(2, 0, (2, 1)),
        ImageSpan(2, 4, (2, 1)),
    )
    ids = [*a.input_ids, *b.input_ids, *c.input_ids]
    assert batch.input_ids.tolist() == [*ids, 7, 7, 7]
    assert batch.labels.tolist() == [*a.labels, *b.labels, *c.labels, -100, -100, -100]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.pixel_values.shape == (3, 3, 4, 4)
    expected = PREPROCESSOR.normalise([*a.images, *c.images])
    assert batch.pixel_values.dtype == torch.uint8
    assert torch.equal(batch.normalised().pixel_values, expected)
    assert batch.sample_keys == ["a", "b", "c"]
    assert batch.num_samples == 3


def test_no_label_crosses_into_the_next_sample() -> None:
    batch = batch_of(sample("a", 3), sample("b", 2))
    assert batch.labels[2] == -100


def test_the_prompt_ends_with_the_token_that_predicts_the_first_label() -> None:
    question, caption, unlabelled = sample("a", 4), sample("b", 3), sample("c", 2)
    question.labels[:2] = -100  # tokens 2 and 3 hold the label and the end
    unlabelled.labels[:] = -100
    assert batch_of(question, caption, unlabelled).layout.prompt_lengths == (3, 1, 2)


def test_a_pack_without_images() -> None:
    assert batch_of(sample("a", 3)).pixel_values.shape == (0, 3, 4, 4)


def test_token_counts() -> None:
    assert sample("a", 3, (0, 1)).num_visual_tokens == 4
    assert sample("a", 3).num_text_tokens == 3


def test_moving_and_dropping_pixels_leave_the_original_alone() -> None:
    batch = batch_of(sample("a", 3, (1,)))
    without = batch.without_pixels()
    assert without.pixel_values.shape == (0, 3, 4, 4)
    assert without.layout.images == batch.layout.images
    assert batch.pixel_values.shape[0] == 1
    assert torch.equal(batch.to("cpu").input_ids, batch.input_ids)


def test_a_pack_beyond_its_budget_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="visual"):
        batch_of(sample("a", 3, (1,)), visual_budget=1)

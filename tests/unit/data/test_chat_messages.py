"""Lists of chat messages become what the same record in LLaVA's form becomes."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dattn.data.chat_messages import as_llava
from megatron_dattn.data.conversation import image_paths, parse_record
from megatron_dattn.data.rejection import Reason, SampleError
from tests.unit.data.builders import record

ANSWER = {"role": "assistant", "content": "A cat."}
IMAGE = {"type": "image"}


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def asked(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def messages(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(turns), **more}


@pytest.mark.parametrize(
    "written",
    [
        messages(asked(IMAGE, said("What?")), ANSWER, images=["cat.jpg"]),
        messages(asked(said("What?"), IMAGE), ANSWER, image="cat.jpg"),
        messages(asked({**IMAGE, "image": "cat.jpg"}, said("What?")), ANSWER),
        messages(asked({**IMAGE, "path": "cat.jpg"}, said("What?")), ANSWER, images=[]),
        messages(asked({**IMAGE, "url": "cat.jpg"}, said("What?")), ANSWER),
        messages(
            asked({"type": "image_url", "image_url": {"url": "cat.jpg"}}, said("What?")), ANSWER
        ),
        messages(asked({"type": "image_url", "image_url": "cat.jpg"}, said("What?")), ANSWER),
        messages({"role": "user", "content": "<image>What?"}, ANSWER, images="cat.jpg"),
        messages(asked(said("<image>"), said("What?")), ANSWER, images=["cat.jpg"]),
        {**record("<image>\nWhat?", "A cat."), "images": ["cat.jpg"]},
        {**record("<image>\nWhat?", "A cat.", "cat.jpg"), "images": ["cat.jpg"], "messages": None},
    ],
)
def test_every_way_to_name_an_image(written: dict[str, Any]) -> None:
    expected = record("<image>\nWhat?", "A cat.", "cat.jpg")
    assert parse_record(written) == parse_record(expected)
    assert image_paths(written) == ("cat.jpg",)


def test_several_images_stay_where_they_are() -> None:
    parts = asked(said("Is "), IMAGE, said("before "), IMAGE, said("?"))
    conversation = parse_record(messages(parts, ANSWER, images=["a.png", "b.png"]))
    assert conversation.turns[0].text == "Is <image>\nbefore <image>\n?"
    assert conversation.images == ("a.png", "b.png")


def test_system_and_further_turns() -> None:
    turns = [
        {"role": "system", "content": [said("Be "), said("brief.")]},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": [said(" a1 ")]},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"},
    ]
    conversation = parse_record(messages(*turns))
    assert conversation.system == "Be brief."
    assert [turn.text for turn in conversation.turns] == ["q1", "a1", "q2", "a2"]


@pytest.mark.parametrize(
    ("bad", "reason", "words"),
    [
        (messages("q", ANSWER), Reason.BAD_RECORD, "a message must be an object"),  # type: ignore[arg-type]
        ({"messages": "q"}, Reason.BAD_RECORD, "must be a list"),
        ({"messages": []}, Reason.BAD_RECORD, "must be a list of turns"),
        (messages({"role": "tool", "content": "x"}, ANSWER), Reason.ODD_ROLES, "role 'tool'"),
        (messages({"role": "user", "content": None}, ANSWER), Reason.BAD_RECORD, "a message must"),
        (messages(asked({"type": "audio"}), ANSWER), Reason.BAD_RECORD, "parts of type text, "),
        (messages(asked({"type": "video"}), ANSWER), Reason.IMAGE_COUNT, "no video is named"),
        (messages(asked("q"), ANSWER), Reason.BAD_RECORD, "parts of type text, image and"),
        (messages(asked({"type": "text"}), ANSWER), Reason.BAD_RECORD, "parts of type text"),
        (messages(asked({**IMAGE, "image": 3}), ANSWER), Reason.BAD_RECORD, "must name a file"),
        (
            messages(asked(IMAGE, said("q")), ANSWER),
            Reason.EXTRA_PLACEHOLDER,
            "1 <image> placeholders",
        ),
        (
            messages(asked({**IMAGE, "image": "a"}, IMAGE), ANSWER, images=["b"]),
            Reason.IMAGE_COUNT,
            "others by the record",
        ),
        (
            messages(asked({**IMAGE, "image": "a"}), ANSWER, images=["a"]),
            Reason.IMAGE_COUNT,
            "others by the record",
        ),
        (messages(asked(said("q"))), Reason.NO_ANSWER, "no answer"),
        (
            {**record("<image>", "a", "b.png"), "images": ["c.png"]},
            Reason.BAD_RECORD,
            "which differ",
        ),
    ],
)
def test_unusable_messages_are_refused_with_a_reason(bad: Any, reason: Reason, words: str) -> None:
    with pytest.raises(SampleError, match=words) as caught:
        parse_record(bad)
    assert caught.value.reason == reason


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.just("user"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "image"]), inner)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(json_values, json_values)
def test_anything_gives_a_record_or_a_sample_error(content: Any, images: Any) -> None:
    with suppress(SampleError):
        converted = as_llava({"messages": content, "images": images})
        assert "conversations" in converted or content is None
        parse_record({"messages": content, "images": images})

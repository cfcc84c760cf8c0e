"""LLaVA records: what is kept, what is moved, what is refused and why."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dattn.data.conversation import Conversation, Turn, parse_record
from megatron_dattn.data.rejection import Reason, SampleError
from tests.unit.data.builders import record

SYSTEM_FIRST = ("system", "human", "gpt")


def chat(*texts: str, image: Any = None, roles: tuple[str, ...] = ("human", "gpt")) -> dict:
    turns = [{"from": roles[i % len(roles)], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns} if image is None else {"image": image, "conversations": turns}


def test_a_single_placeholder_moves_to_the_front_of_its_turn() -> None:
    for text in ("What is it?\n<image>", "<image>\nWhat is it?", "  What is <image>it? "):
        conversation = parse_record(record(text, " A cat. ", "cat.jpg"))
        assert conversation.turns[0] == Turn("user", "<image>\nWhat is it?", 1)
        assert conversation.turns[1] == Turn("assistant", "A cat.")
        assert conversation.images == ("cat.jpg",)


def test_several_placeholders_of_one_turn_keep_their_places() -> None:
    conversation = parse_record(record("Is <image> before <image>?", "Yes", ["a.png", "b.png"]))
    assert conversation.turns[0] == Turn("user", "Is <image> before <image>?", 2)


def test_images_may_be_spread_over_turns() -> None:
    conversation = parse_record(chat("<image>\na", "b", "c <image>", "d", image=["1.png", "2.png"]))
    assert [turn.num_images for turn in conversation.turns] == [1, 0, 1, 0]
    assert conversation.turns[2].text == "<image>\nc"


def test_a_placeholder_alone_is_a_question() -> None:
    assert parse_record(record("<image>", "A cat.", "cat.jpg")).turns[0].text == "<image>"


def test_text_only_records_and_a_leading_answer() -> None:
    assert parse_record(record("hi", "hello")) == Conversation(
        (Turn("user", "hi"), Turn("assistant", "hello"))
    )
    leading = chat("dropped", "hi", "hello", roles=("gpt", "human"))
    assert parse_record(leading) == parse_record(record("hi", "hello"))


def test_the_first_exchanges_keep_their_images_only() -> None:
    conversation = parse_record(
        chat("<image>\na", "b", "<image>\nc", "d", image=["1.png", "2.png"])
    )
    assert conversation.first_exchanges(1) == parse_record(record("<image>\na", "b", "1.png"))


@pytest.mark.parametrize("nothing", ["", " ", None, [], [""], [None]])
def test_an_image_or_video_that_is_empty_is_none(nothing: Any) -> None:
    assert parse_record({**record("hi", "hello"), "image": nothing}) == parse_record(
        record("hi", "hello")
    )
    seen = record("<image>", "A cat.", "cat.jpg")
    assert parse_record({**seen, "video": nothing}) == parse_record(seen)


def test_a_system_message_comes_as_a_turn_or_as_a_key() -> None:
    plain = parse_record(record("q", "a"))
    told = chat("Be brief.", "q", "a", roles=SYSTEM_FIRST)
    assert parse_record(told) == replace(plain, system="Be brief.")
    assert parse_record({**record("q", "a"), "system": "Be brief."}) == parse_record(told)
    assert parse_record({**told, "system": "Be long."}) == parse_record(told)
    assert parse_record(told).messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    for empty in (" ", "", None):
        assert parse_record({**record("q", "a"), "system": empty}) == plain
    assert parse_record(chat("", "q", "a", roles=SYSTEM_FIRST)) == plain
    # A leading answer is dropped behind a system message too.
    leading = chat("Be brief.", "dropped", "q", "a", roles=("system", "gpt", "human", "gpt"))
    assert parse_record(leading) == parse_record(told)


def test_the_first_exchanges_keep_the_system_message() -> None:
    told = {**chat("q", "a", "q", "a"), "system": "Be brief."}
    assert parse_record(told).first_exchanges(1).system == "Be brief."


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (chat("q"), Reason.NO_ANSWER),
        (chat("a", roles=("gpt",)), Reason.NO_ANSWER),
        (chat("q", "a", "q"), Reason.NO_ANSWER),
        (chat("q", " \n"), Reason.EMPTY_ANSWER),
        (chat("q", "q", "a", roles=("human", "human", "gpt")), Reason.ODD_ROLES),
        (chat("q", "a", roles=("human", "system")), Reason.ODD_ROLES),
        (chat("s", "s", "q", "a", roles=("system", "system", "human", "gpt")), Reason.ODD_ROLES),
        (chat("s", roles=("system",)), Reason.NO_ANSWER),
        (chat("s", "q", roles=("system", "human")), Reason.NO_ANSWER),
        (chat("<image>", "q", "a", image="x.png", roles=SYSTEM_FIRST), Reason.CONTROL_TOKEN),
        (chat("s \ud800", "q", "a", roles=SYSTEM_FIRST), Reason.BAD_RECORD),
        ({**chat("q", "a"), "system": 3}, Reason.BAD_RECORD),
        (chat("q", "a", roles=("human", None)), Reason.ODD_ROLES),  # type: ignore[arg-type]
        (chat("a", "a", "q", "a", roles=("gpt", "gpt", "human", "gpt")), Reason.ODD_ROLES),
        (chat("q", "a", image="x.png"), Reason.IMAGE_COUNT),
        (chat("<image>", "a"), Reason.EXTRA_PLACEHOLDER),
        (chat("<image><image>", "a", image="x.png"), Reason.EXTRA_PLACEHOLDER),
        (chat("q", "see <image>", image="x.png"), Reason.CONTROL_TOKEN),
        (chat("what <im<image>age>?", "a", image="x.png"), Reason.CONTROL_TOKEN),
        (chat("<image>", "a", image=""), Reason.EXTRA_PLACEHOLDER),
        (chat("<image><image>", "a", image=["x.png", ""]), Reason.EXTRA_PLACEHOLDER),
        (chat("<image>", "a", image=[3]), Reason.BAD_RECORD),
        ({**chat("q", "a"), "video": "x.mp4"}, Reason.IMAGE_COUNT),
        ({**chat("q", "a"), "video": ["x.mp4"]}, Reason.IMAGE_COUNT),
        (chat("q \ud800", "a"), Reason.BAD_RECORD),
        ({"conversations": []}, Reason.BAD_RECORD),
        ({"conversations": "q"}, Reason.BAD_RECORD),
        ({"conversations": ["q", "a"]}, Reason.BAD_RECORD),
        ({"conversations": [{"from": "human", "value": 3}]}, Reason.BAD_RECORD),
        ({}, Reason.BAD_RECORD),
        ([], Reason.BAD_RECORD),
        (None, Reason.BAD_RECORD),
    ],
)
def test_unusable_records_are_refused_with_a_reason(bad: Any, reason: Reason) -> None:
    with pytest.raises(SampleError) as caught:
        parse_record(bad)
    assert caught.value.reason == reason
    assert str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
turns = st.fixed_dictionaries(
    {
        "from": st.sampled_from(["human", "gpt", "system"]) | json_values,
        "value": st.sampled_from(["<image>\nq", "a", "", "<image><image>"]) | json_values,
    }
)
records = st.fixed_dictionaries(
    {"conversations": st.lists(turns, max_size=4) | json_values},
    optional={
        "image": json_values | st.just("x.png"),
        "id": json_values,
        "system": json_values,
        "video": json_values,
    },
)


@settings(deadline=None)
@given(json_values | records)
def test_any_json_gives_a_conversation_or_a_sample_error(value: Any) -> None:
    try:
        conversation = parse_record(value)
    except SampleError:
        return
    roles = [turn.role for turn in conversation.turns]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert len(conversation.images) == sum(turn.num_images for turn in conversation.turns)
    assert all(conversation.answers)

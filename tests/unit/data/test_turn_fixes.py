"""Each fix gives the record that a careful writer would have written, or the error as before."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dattn.data.conversation import Conversation, parse_record
from megatron_dattn.data.problems import FIXED_BY_DEFAULT
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.videos import Video
from tests.unit.data.test_conversation import chat, records

ALL = frozenset(Reason)


def fixed(record: Any, *reasons: Reason) -> Conversation:
    """A record after these fixes, which it needs and which suffice."""
    with pytest.raises(SampleError) as caught:
        parse_record(record, frozenset())
    assert caught.value.reason in reasons
    conversation = parse_record(record, frozenset(reasons))
    assert conversation.fixed == frozenset(reasons)
    return conversation


def test_other_spellings_of_roles() -> None:
    wanted = parse_record(chat("s", "q", "a", roles=("system", "human", "gpt")))
    for system, human, gpt in (("System", "user", "assistant"), ("developer", "Human ", "MODEL")):
        record = chat("s", "q", "a", roles=(system, human, gpt))
        assert fixed(record, Reason.ODD_ROLES) == wanted
    messages = [{"role": role, "content": role} for role in ("Human", "model")]
    assert fixed({"messages": messages}, Reason.ODD_ROLES).messages == [
        {"role": "user", "content": "Human"},
        {"role": "assistant", "content": "model"},
    ]


def test_a_leading_answer_may_be_refused() -> None:
    record = chat("hi", "q", "a", roles=("gpt", "human", "gpt", "human"))
    assert fixed(record, Reason.LEADING_ANSWER) == parse_record(chat("q", "a"))
    assert parse_record(record).fixed == {Reason.LEADING_ANSWER}


def test_a_last_question_without_an_answer_is_dropped_with_its_images() -> None:
    record = chat("<image>q", "a", "<image>r", image=["1.png", "2.png"])
    assert fixed(record, Reason.NO_ANSWER) == parse_record(chat("<image>q", "a", image="1.png"))


def test_an_empty_answer_is_dropped_with_its_question_and_its_images_wait() -> None:
    record = chat("<image>q", " ", "r <image>", "b", "s", "", image=["1.png", "2.png"])
    wanted = chat("<image>\n<image>\nr", "b", image=["1.png", "2.png"])
    assert fixed(record, Reason.EMPTY_ANSWER) == parse_record(wanted)
    # Behind them no question follows: they go too.
    record = chat("q", "a", "<image>r", "", image="1.png")
    assert fixed(record, Reason.EMPTY_ANSWER) == parse_record(chat("q", "a"))


def test_an_image_without_a_placeholder_comes_first() -> None:
    record = chat("q", "a", "r", "b", image="1.png")
    wanted = chat("<image>q", "a", "r", "b", image="1.png")
    assert fixed(record, Reason.IMAGE_COUNT) == parse_record(wanted)


def test_placeholders_without_an_image_are_removed_from_behind() -> None:
    record = chat("<image> and <image>", "a", "<image>r", "b", image="1.png")
    wanted = chat("<image>\nand", "a", "r", "b", image="1.png")
    assert fixed(record, Reason.EXTRA_PLACEHOLDER) == parse_record(wanted)
    assert fixed(chat("<image>q", "a"), Reason.EXTRA_PLACEHOLDER) == parse_record(chat("q", "a"))


def test_videos_and_images_keep_their_places_together() -> None:
    shown = {"image": ["1.png", "2.png"], "videos": ["a.mp4", "b.mp4"]}
    ask = "<video> or <image> <image> <image>"
    record = {**chat(ask, " ", "<video> and <video>?", "b"), **shown}
    fixes = (Reason.EMPTY_ANSWER, Reason.EXTRA_PLACEHOLDER)
    conversation = parse_record(record, frozenset(fixes))
    assert conversation.fixed == set(fixes)
    assert conversation.turns[0].text == "<image>\n" * 3 + "<image>\nand ?"
    first, second = (Video((name,), is_file=True) for name in shown["videos"])
    assert conversation.images == (first, "1.png", "2.png", second)
    # Either the one or the other alone is refused, and so is a kind that lacks placeholders.
    for fixing in fixes:
        with pytest.raises(SampleError):
            parse_record(record, frozenset([fixing]))
    with pytest.raises(SampleError, match="0 <image> for 2 images and 3 <video> for 2") as caught:
        parse_record({**chat("<video><video><video>", "b"), **shown}, ALL)
    assert caught.value.reason == Reason.IMAGE_COUNT


def test_a_video_is_fixed_as_an_image_is() -> None:
    alone = {"video": "a.mp4"}
    wanted = parse_record({**chat("<video>q", "a"), **alone})
    assert fixed({**chat("q", "a"), **alone}, Reason.IMAGE_COUNT) == wanted
    for ask in ("<video>q<video>", "<image>q<image>", "<video>q<image>"):
        assert fixed({**chat(ask, "a"), **alone}, Reason.EXTRA_PLACEHOLDER) == wanted


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (chat("q", ""), Reason.EMPTY_ANSWER),  # nothing would be left
        (chat("q"), Reason.NO_ANSWER),
        (chat("q", "q", "a", roles=("human", "human", "gpt")), Reason.ODD_ROLES),
        (chat("q", "a", roles=("human", "tool")), Reason.ODD_ROLES),
        (chat("q", "a", image=["1.png", "2.png"]), Reason.IMAGE_COUNT),
        (chat("<image>q", "a", image=["1.png", "2.png"]), Reason.IMAGE_COUNT),
    ],
)
def test_what_a_fix_does_not_reach_is_refused_as_ever(bad: Any, reason: Reason) -> None:
    with pytest.raises(SampleError) as caught:
        parse_record(bad, ALL)
    assert caught.value.reason == reason


@given(value=records, fixing=st.sets(st.sampled_from(list(Reason))).map(frozenset))
def test_fixes_give_sound_conversations_and_are_all_noted(
    value: Any, fixing: frozenset[Reason]
) -> None:
    try:
        conversation = parse_record(value, fixing)
    except SampleError:
        return
    assert len(conversation.images) == sum(turn.num_images for turn in conversation.turns)
    assert [turn.text.count("<image>") for turn in conversation.turns] == [
        turn.num_images for turn in conversation.turns
    ]
    assert all(conversation.answers)
    assert conversation.fixed <= fixing
    # Only what was needed is noted: without one of them it is refused.
    for reason in conversation.fixed:
        with pytest.raises(SampleError):
            parse_record(value, fixing - {reason})
    if not conversation.fixed - FIXED_BY_DEFAULT:
        assert parse_record(value) == conversation

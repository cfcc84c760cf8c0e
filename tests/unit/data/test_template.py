"""Prompt strings, label masks from offsets, and text that tries to be more than text."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megatron_dattn.batch import IGNORED_LABEL
from megatron_dattn.data.conversation import Conversation, Turn, parse_record
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.template import ConversationTokenizer
from megatron_dattn.data.templates import read_template
from megatron_dattn.errors import ConfigError
from tests.unit.data.builders import SPECIAL_TOKENS, conversation, make_tokenizer, record

TOKENIZER = make_tokenizer()
MISTRAL = ConversationTokenizer(TOKENIZER, "mistral_v3")
PLAIN = ConversationTokenizer(TOKENIZER, "plain")


def marked(template: ConversationTokenizer, chat: Conversation) -> str:
    """The rendered text with the supervised spans in double square brackets."""
    text, spans = template.render(chat)
    for start, end in reversed(spans):
        text = f"{text[:start]}[[{text[start:end]}]]{text[end:]}"
    return text


def supervised_ids(labels: list[int]) -> list[int]:
    return [label for label in labels if label != IGNORED_LABEL]


def test_mistral_v3_golden() -> None:
    chat = conversation("q1\n<image>", " a1 ", "q2", "a2\n", images=1)
    assert marked(MISTRAL, chat) == (
        "<s>[INST] <image>\nq1[/INST][[ a1</s>]][INST] q2[/INST][[ a2</s>]]"
    )


def test_mistral_v3_text_only_and_interleaved_golden() -> None:
    assert marked(MISTRAL, conversation("q", "a")) == "<s>[INST] q[/INST][[ a</s>]]"
    assert marked(MISTRAL, conversation("<image> or <image>?", "a", images=2)) == (
        "<s>[INST] <image> or <image>?[/INST][[ a</s>]]"
    )


def test_plain_golden() -> None:
    chat = conversation("<image>\nDescribe the picture.", " A cat.\n", images=1)
    assert marked(PLAIN, chat) == "<s><image>[[A cat.\n]]"
    assert marked(PLAIN, conversation("Say something.", "A cat.")) == "<s>[[A cat.\n]]"


def chat_prompt(messages: list[dict]) -> str:
    return TOKENIZER.apply_chat_template(
        messages,
        chat_template=read_template("mistral_v3"),
        tokenize=False,
        add_generation_prompt=True,
    )


def test_the_generation_prompt_ends_at_the_closing_mark() -> None:
    asked = [{"role": "user", "content": "<image>\nq1"}]
    assert chat_prompt(asked) == "<s>[INST] <image>\nq1[/INST]"
    parts = [{"type": "image"}, {"type": "text", "text": "q1"}]
    assert chat_prompt([{"role": "user", "content": parts}]) == chat_prompt(asked)


def test_a_system_message_stands_before_the_last_question() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
    ]
    assert chat_prompt(messages) == "<s>[INST] q1[/INST] a1</s>[INST] Be brief.\n\nq2[/INST]"


def test_a_record_with_a_system_message_trains_with_the_template_s() -> None:
    chat = replace(conversation("<image>\nq1", "a1", "q2", "a2", images=1), system="Be brief.")
    assert marked(MISTRAL, chat) == (
        "<s>[INST] <image>\nq1[/INST][[ a1</s>]][INST] Be brief.\n\nq2[/INST][[ a2</s>]]"
    )
    tokens = MISTRAL(chat)
    assert [TOKENIZER.decode(p) for p in _answers(supervised_ids(tokens.labels))] == ["a1", "a2"]
    with pytest.raises(SampleError) as caught:
        MISTRAL(replace(chat, system="Be [INST] brief."))
    assert caught.value.reason == Reason.CONTROL_TOKEN


def _answers(ids: list[int]) -> list[list[int]]:
    """Split at the end token."""
    answers: list[list[int]] = [[]]
    for index in ids:
        if index == TOKENIZER.eos_token_id:
            answers.append([])
        else:
            answers[-1].append(index)
    return answers[:-1]


def test_captions_show_no_system_message() -> None:
    chat = conversation("<image>\nDescribe it.", "A cat.", images=1)
    assert PLAIN(replace(chat, system="Be brief.")) == PLAIN(chat)


def test_a_prompt_is_the_prefix_of_its_training_text() -> None:
    chat = conversation("<image>\nq1", "a1", images=1)
    text, spans = MISTRAL.render(chat)
    assert chat_prompt(chat.messages[:1]) == text[: spans[0][0]]


def test_labels_are_the_next_supervised_token_and_images_leave_no_token() -> None:
    tokens = MISTRAL(conversation("<image>\nq", "a red square", images=1))
    ids = TOKENIZER("<s>[INST] <image>\nq[/INST] a red square</s>", add_special_tokens=False)
    image_id = TOKENIZER.convert_tokens_to_ids("<image>")
    expected = [index for index in ids.input_ids if index != image_id]
    assert tokens.input_ids == expected
    assert tokens.image_offsets == (ids.input_ids.index(image_id),)
    closing = expected.index(TOKENIZER.convert_tokens_to_ids("[/INST]"))
    assert tokens.labels[:closing] == [IGNORED_LABEL] * closing
    assert tokens.labels[closing:-1] == expected[closing + 1 :]
    assert tokens.labels[-1] == IGNORED_LABEL
    assert tokens.labels[-2] == TOKENIZER.eos_token_id


def test_in_a_caption_the_token_before_the_image_predicts_the_first_token() -> None:
    tokens = PLAIN(conversation("<image>", "a red square", images=1))
    assert tokens.image_offsets == (1,)
    assert tokens.labels == [*tokens.input_ids[1:], IGNORED_LABEL]
    assert TOKENIZER.eos_token_id not in tokens.input_ids


def test_plain_refuses_conversations_of_more_turns() -> None:
    with pytest.raises(SampleError) as caught:
        PLAIN(conversation("q", "a", "q", "a"))
    assert caught.value.reason == Reason.NOT_A_CAPTION


def test_an_unknown_template_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="mistral_v3, model, plain"):
        ConversationTokenizer(TOKENIZER, "llava")


# Words that byte-pair merging joins with their neighbours, characters outside the vocabulary,
# white space of all kinds.
words = st.sampled_from(
    ["red", " square", "1", "?", "\n", "  ", "\t", "\u00e9", "\u4e2d", "\U0001f600"]
)
# The tokenizer's own mark for spaces is decoded as a space.
characters = st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])
texts = st.lists(words | st.text(characters, max_size=4), min_size=1, max_size=8).map("".join)
answers = texts.filter(lambda text: text.strip())


@settings(deadline=None)
@given(st.lists(st.tuples(texts, answers), min_size=1, max_size=3), st.booleans())
def test_the_supervised_tokens_spell_the_answers(
    exchanges: list[tuple[str, str]], with_image: bool
) -> None:
    spoken = [text for exchange in exchanges for text in exchange]
    if with_image:
        spoken[0] = f"<image>\n{spoken[0]}"
    chat = conversation(*spoken, images=int(with_image))
    tokens = MISTRAL(chat)
    text, spans = MISTRAL.render(chat)
    assert [text[start:end] for start, end in spans] == [f" {a}</s>" for a in chat.answers]
    ids = supervised_ids(tokens.labels)
    pieces: list[list[int]] = [[]]
    for index in ids:
        pieces[-1].append(index)
        if index == TOKENIZER.eos_token_id:
            pieces.append([])
    assert pieces.pop() == []
    # The decoder of sentencepiece-like tokenizers strips the one space in front.
    assert [TOKENIZER.decode(p, clean_up_tokenization_spaces=False) for p in pieces] == [
        f"{answer}</s>" for answer in chat.answers
    ]


@settings(deadline=None)
@given(answers)
def test_the_supervised_tokens_spell_the_caption(caption: str) -> None:
    chat = conversation("<image>", caption, images=1)
    decoded = TOKENIZER.decode(supervised_ids(PLAIN(chat).labels))
    assert decoded in (f"{caption.strip()}\n", f" {caption.strip()}\n")


hostile = st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "[INS", "T]", "<", "s>", "/", "<ima", "ge>", "[", " ", "ab"])
    | st.text(max_size=2),
    min_size=1,
    max_size=6,
).map("".join)


@settings(deadline=None)
@given(hostile, hostile)
def test_text_never_becomes_a_control_token(question: str, answer: str) -> None:
    """Either the record is refused, or the control tokens are the template's own, in its order."""
    try:
        chat = conversation(question, answer)
        tokens = MISTRAL(chat)
    except SampleError:
        return
    special = {TOKENIZER.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS[1:]}
    written = [TOKENIZER.convert_ids_to_tokens(i) for i in tokens.input_ids if i in special]
    assert written == ["<s>", "[INST]", "[/INST]", "</s>"]
    assert tokens.image_offsets == ()


@pytest.mark.parametrize("token", [token for token in SPECIAL_TOKENS if token != "<unk>"])
@pytest.mark.parametrize("place", ["question", "answer"])
def test_control_tokens_in_text_are_refused(token: str, place: str) -> None:
    spoken = {"question": "q", "answer": "a", place: f"some {token} text"}
    with pytest.raises(SampleError) as caught:
        MISTRAL(conversation(spoken["question"], spoken["answer"]))
    assert caught.value.reason in (Reason.CONTROL_TOKEN, Reason.EXTRA_PLACEHOLDER)


def test_markup_that_is_no_control_token_is_ordinary_text() -> None:
    tokens = MISTRAL(conversation("what is <b> ?", "a < b and [x]"))
    assert TOKENIZER.decode(supervised_ids(tokens.labels)) == "a < b and [x]</s>"


def test_masks_agree_with_transformers(tokenizer: PreTrainedTokenizerFast) -> None:
    """The same mask as apply_chat_template's own, which maps characters to tokens."""
    chat = conversation("what is it ?", "a red square \u4e2d", "where ?", "left")
    encoded = tokenizer.apply_chat_template(
        chat.messages,
        chat_template=read_template("mistral_v3"),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    tokens = MISTRAL(chat)
    assert tokens.input_ids == encoded["input_ids"]
    mask = [*encoded["assistant_masks"][1:], 0]
    assert [int(label != IGNORED_LABEL) for label in tokens.labels] == mask


def test_turns_with_the_same_shape_share_one_reference() -> None:
    template = ConversationTokenizer(TOKENIZER, "mistral_v3")
    for word in ("a", "b", "c"):
        template(Conversation((Turn("user", word), Turn("assistant", word))))
    template(parse_record(record("<image>", "a", "x.png")))
    assert len(template._expected) == 2


@pytest.mark.parametrize("template", [MISTRAL, PLAIN], ids=["mistral_v3", "plain"])
def test_a_tokenised_prompt_is_the_beginning_of_its_training_tokens(
    template: ConversationTokenizer,
) -> None:
    chat = conversation("<image>\nwhat is it ?", "a red square", images=1)
    tokens = template(chat)
    prompt = template.prompt(Conversation(chat.turns[:1], chat.images))
    length = len(prompt.input_ids)
    assert prompt.input_ids == tokens.input_ids[:length]
    assert prompt.image_offsets == tokens.image_offsets
    assert tokens.labels[length - 1] != IGNORED_LABEL
    assert set(tokens.labels[: length - 1]) <= {IGNORED_LABEL}

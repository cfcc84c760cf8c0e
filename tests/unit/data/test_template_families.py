"""The templates of Gemma, Llama and Vicuna: their makers' strings, masks, ends and prompts."""

from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_dattn.batch import IGNORED_LABEL
from megatron_dattn.data import templates
from megatron_dattn.data.conversation import Conversation
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.template import ConversationTokenizer
from megatron_dattn.data.templates import (
    TEMPLATES,
    TemplateName,
    read_template,
    template_tokens,
)
from tests.unit.data.builders import conversation, make_tokenizer

GEMMA = make_tokenizer(
    ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<image>"],
    bos="<bos>",
    eos="<eos>",
)
LLAMA3 = make_tokenizer(
    [
        "<unk>",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<image>",
        *template_tokens("llama3").control,
    ],
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
)
VICUNA = make_tokenizer(["<unk>", "<s>", "</s>", "<image>"])
TOKENIZERS = {
    "gemma": GEMMA,
    "llama3": LLAMA3,
    "llama2": VICUNA,
    "vicuna_v1": VICUNA,
    "mistral_v1": VICUNA,
}
ENDS = {
    "gemma": "<end_of_turn>",
    "llama3": "<|eot_id|>",
    "vicuna_v1": "</s>",
    "mistral_v1": "</s>",
    "llama2": "</s>",
}
# What Google and Meta publish in their tokenizers' chat_template.
OFFICIAL = {
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        "+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "llama2": (
        "{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
}
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
every_template = pytest.mark.parametrize("name", list(TOKENIZERS))


def encoder(name: str) -> ConversationTokenizer:
    return ConversationTokenizer(TOKENIZERS[name], name)


def marked(name: str, chat: Conversation) -> str:
    """The rendered text with the supervised spans in double square brackets."""
    text, spans = encoder(name).render(chat)
    for start, end in reversed(spans):
        text = f"{text[:start]}[[{text[start:end]}]]{text[end:]}"
    return text


def rendered(source: str, messages: list[dict], tokenizer: PreTrainedTokenizerFast, **more) -> str:
    texts, _ = render_jinja_template(
        [messages],
        chat_template=source,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        **more,
    )
    return texts[0]


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        (
            "gemma",
            "<bos><start_of_turn>user\n<image>\nq1<end_of_turn>\n"
            "<start_of_turn>model\n[[a1<end_of_turn>]]\n"
            "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\n[[a2<end_of_turn>]]\n",
        ),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\nq1<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[[a1<|eot_id|>]]"
            "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[[a2<|eot_id|>]]",
        ),
        (
            "vicuna_v1",
            f"<s>{VICUNA_SYSTEM} USER: <image>\nq1 ASSISTANT:[[ a1</s>]]"
            "USER: q2 ASSISTANT:[[ a2</s>]]",
        ),
        (
            "llama2",
            "<s>[INST] <image>\nq1 [/INST][[ a1 </s>]]<s>[INST] q2 [/INST][[ a2 </s>]]",
        ),
        (
            "mistral_v1",
            "<s>[INST] <image>\nq1 [/INST][[ a1</s>]][INST] q2 [/INST][[ a2</s>]]",
        ),
    ],
)
def test_golden(name: str, golden: str) -> None:
    assert marked(name, conversation("q1\n<image>", " a1 ", "q2", "a2\n", images=1)) == golden


@pytest.mark.parametrize("name", list(OFFICIAL))
@pytest.mark.parametrize("num_messages", [1, 2, 3])
def test_the_text_is_the_maker_s(name: str, num_messages: int) -> None:
    spoken = [" q1", "a1\n", "q2 "][:num_messages]
    roles = ["user", "assistant", "user"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, spoken, strict=False)]
    for prompt in (False, True):
        ours, theirs = (
            rendered(source, messages, TOKENIZERS[name], add_generation_prompt=prompt)
            for source in (read_template(name), OFFICIAL[name])
        )
        assert ours == theirs


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("gemma", "<bos><start_of_turn>user\nBe brief.\n\nq<end_of_turn>\n"),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>",
        ),
        ("vicuna_v1", "<s>Be brief. USER: q"),
        ("llama2", "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq [/INST]"),
        ("mistral_v1", "<s>[INST] Be brief.\n\nq [/INST]"),
    ],
)
def test_a_system_message(name: str, golden: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    assert rendered(read_template(name), messages, TOKENIZERS[name]) == golden


@every_template
def test_content_in_parts_is_the_same_text(name: str) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "q1"}]
    texts = {
        rendered(read_template(name), [{"role": "user", "content": content}], TOKENIZERS[name])
        for content in (parts, "<image>\nq1")
    }
    assert len(texts) == 1


@every_template
def test_the_end_of_an_answer_is_supervised(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    chat = conversation("<image>\nwhat ?", "a red square", "where ?", "left", images=1)
    labels = encoder(name)(chat).labels
    end = tokenizer.convert_tokens_to_ids(ENDS[name])
    assert labels.count(end) == 2
    assert ENDS[name] == (template_tokens(name).end or tokenizer.eos_token)


@every_template
def test_a_prompt_is_the_beginning_of_its_training_records(name: str) -> None:
    chat = conversation("<image>\nwhat is it ?", "a red square", images=1)
    records = encoder(name)(chat)
    prompt = encoder(name).prompt(Conversation(chat.turns[:1], chat.images))
    length = len(prompt.input_ids)
    assert prompt.input_ids == records.input_ids[:length]
    assert prompt.image_offsets == records.image_offsets
    assert records.labels[length - 1] != IGNORED_LABEL
    assert set(records.labels[: length - 1]) <= {IGNORED_LABEL}


@every_template
def test_masks_agree_with_transformers(name: str) -> None:
    chat = conversation("what is it ?", "a red square \u4e2d", "where ?", "left")
    encoded = TOKENIZERS[name].apply_chat_template(
        chat.messages,
        chat_template=read_template(name),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    records = encoder(name)(chat)
    assert records.input_ids == encoded["input_ids"]
    mask = [*encoded["assistant_masks"][1:], 0]
    assert [int(label != IGNORED_LABEL) for label in records.labels] == mask


@every_template
@pytest.mark.parametrize("place", ["question", "answer"])
def test_control_tokens_in_text_are_refused(name: str, place: str) -> None:
    for token in (*template_tokens(name).control, TOKENIZERS[name].bos_token):
        spoken = {"question": "q", "answer": "a", place: f"some {token} text"}
        with pytest.raises(SampleError) as caught:
            encoder(name)(conversation(spoken["question"], spoken["answer"]))
        assert caught.value.reason == Reason.CONTROL_TOKEN


# The tokenizer's own mark for spaces is decoded as a space.
characters = st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])
words = st.sampled_from(["red", " square", "1", "?", "\n", "  ", "\u4e2d", "USER:", "model\n"])
texts = st.lists(words | st.text(characters, max_size=4), min_size=1, max_size=8).map("".join)
answers = texts.filter(lambda text: text.strip())


@settings(deadline=None)
@given(
    st.sampled_from(list(TOKENIZERS)),
    st.lists(st.tuples(texts, answers), min_size=1, max_size=3),
    st.booleans(),
)
def test_the_supervised_tokens_spell_the_answers(
    name: str, exchanges: list[tuple[str, str]], with_image: bool
) -> None:
    spoken = [text for exchange in exchanges for text in exchange]
    if with_image:
        spoken[0] = f"<image>\n{spoken[0]}"
    chat = conversation(*spoken, images=int(with_image))
    template, tokenizer = encoder(name), TOKENIZERS[name]
    text, spans = template.render(chat)
    lead = " " if name in ("vicuna_v1", "mistral_v1", "llama2") else ""
    close = (" " if name == "llama2" else "") + ENDS[name]
    assert [text[start:end] for start, end in spans] == [
        f"{lead}{answer}{close}" for answer in chat.answers
    ]
    end = tokenizer.convert_tokens_to_ids(ENDS[name])
    pieces: list[list[int]] = [[]]
    for label in template(chat).labels:
        if label != IGNORED_LABEL:
            pieces[-1].append(label)
        if label == end:
            pieces.append([])
    assert pieces.pop() == []
    # The decoder of sentencepiece-like tokenizers strips one space in front.
    decoded = [tokenizer.decode(p, clean_up_tokenization_spaces=False) for p in pieces]
    assert decoded == [f"{answer}{close}" for answer in chat.answers]


def test_names_files_and_entries_are_the_same_set() -> None:
    files = {path.stem for path in Path(templates.__file__).parent.glob("*.jinja")}
    assert files == set(TEMPLATES) == set(get_args(TemplateName)) - {"model"}

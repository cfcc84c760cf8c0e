"""Chat messages for an export become what the loader makes of the same record."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_dattn.conversion.io.tokenizer_files import chat_template
from megatron_dattn.data.conversation import IMAGE_TOKEN, Conversation, parse_record
from megatron_dattn.data.template import ConversationTokenizer
from megatron_dattn.data.templates import TEMPLATES
from tests.unit.data import test_model_template as model_templates
from tests.unit.data.builders import make_tokenizer
from tests.unit.data.test_template_families import GEMMA, LLAMA3, VICUNA

TOKENIZERS = {
    "plain": VICUNA,
    "mistral_v1": VICUNA,
    "mistral_v3": make_tokenizer(),
    "llama2": VICUNA,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "vicuna_v1": VICUNA,
}
# Models' own templates, behind ours; but for the one that writes today's date.
OWN = {f"own {name}": t for name, t in model_templates.TOKENIZERS.items() if name != "llama3"}
NAMES = [*TEMPLATES, *OWN]
every_template = pytest.mark.parametrize("name", NAMES)


def template_of(name: str) -> str:
    return "model" if name in OWN else name


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return OWN[name] if name in OWN else TOKENIZERS[name]


def encoder_of(name: str) -> ConversationTokenizer:
    return ConversationTokenizer(tokenizer_of(name), template_of(name))


IMAGE = {"type": "image"}
Parts = list[dict[str, str]]


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def exported(name: str, messages: list[dict[str, Any]], *, ask: bool = False) -> str:
    tokenizer = tokenizer_of(name)
    texts, _ = render_jinja_template(
        [messages],
        chat_template=chat_template(template_of(name), tokenizer.chat_template),
        add_generation_prompt=ask,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )
    return texts[0]


def as_value(parts: Parts) -> str:
    """How a LLaVA record writes the parts: every image is a placeholder and a line break."""
    return "".join(part.get("text", f"{IMAGE_TOKEN}\n") for part in parts)


def loaded(name: str, exchanges: list[tuple[Parts, str]]) -> str:
    """What the loader renders of a record with these questions and answers."""
    turns = []
    for question, answer in exchanges:
        turns += [{"from": "human", "value": as_value(question)}, {"from": "gpt", "value": answer}]
    count = sum(part == IMAGE for question, _ in exchanges for part in question)
    record = {"conversations": turns, **({"image": ["x.png"] * count} if count else {})}
    conversation = parse_record(record)
    assert len(conversation.images) == count
    return encoder_of(name).render(conversation)[0]


texts = st.text(st.sampled_from("ab \n?"), max_size=5).map(said)
questions = st.lists(texts | st.just(IMAGE), min_size=1, max_size=4)
answers = st.text(st.sampled_from("ab \n"), min_size=1, max_size=5).filter(str.strip)


@settings(deadline=None)
@given(st.sampled_from(NAMES), st.lists(st.tuples(questions, answers), min_size=1))
def test_parts_in_any_order_are_written_as_the_loader_writes_them(
    name: str, exchanges: list[tuple[Parts, str]]
) -> None:
    exchanges = exchanges[:1] if name == "plain" else exchanges[:3]
    in_parts, in_texts = [], []
    for question, answer in exchanges:
        in_parts += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [said(answer)]},
        ]
        in_texts += [
            {"role": "user", "content": as_value(question)},
            {"role": "assistant", "content": answer},
        ]
    expected = loaded(name, exchanges)
    assert exported(name, in_parts) == expected
    assert exported(name, in_texts) == expected


@every_template
@pytest.mark.parametrize(
    "parts",
    [
        [IMAGE, said("what is this?")],
        [said("what is this?"), IMAGE],
        [said("what is this?\n<image>")],
        [{"type": "image_url"}, said(" what is this? ")],
    ],
)
def test_the_only_image_of_a_question_comes_first(name: str, parts: Parts) -> None:
    (turn,) = parse_record(
        {
            "image": "x.png",
            "conversations": [
                {"from": "human", "value": as_value([IMAGE, said("what is this?")])},
                {"from": "gpt", "value": "a"},
            ],
        }
    ).turns[:1]
    encoder = encoder_of(name)
    prompt = exported(name, [{"role": "user", "content": parts}], ask=True)
    if name == "plain":
        assert prompt == TOKENIZERS[name].bos_token + IMAGE_TOKEN
        return
    assert prompt == encoder.render(Conversation((turn,), ("x.png",)))[0]
    assert "<image>\nwhat is this?" in prompt


@every_template
def test_a_part_that_is_neither_text_nor_image_is_refused(name: str) -> None:
    for role in ("user", "assistant"):
        first = [] if role == "user" else [{"role": "user", "content": "a"}]
        messages = [*first, {"role": role, "content": [{"type": "video"}, said("b")]}]
        with pytest.raises(TemplateError, match="parts of type image and text, not video"):
            exported(name, messages)


def test_captions_are_made_of_one_question() -> None:
    asked, told = {"role": "user", "content": [IMAGE]}, {"role": "system", "content": "be short"}
    caption = {"role": "assistant", "content": [said("a "), said("b")]}
    assert exported("plain", [told, asked]) == exported("plain", [asked]) == "<s><image>"
    assert exported("plain", [told, asked, caption]) == "<s><image>a b\n"
    for messages in ([asked, asked], [asked, caption, asked], [caption], [told]):
        with pytest.raises(TemplateError, match="one message with an image"):
            exported("plain", messages)

"""A model's own chat template: what is supervised is found, whatever the template looks like."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_dattn.batch import IGNORED_LABEL
from megatron_dattn.data.conversation import Conversation
from megatron_dattn.data.model_template import ModelTemplate
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.template import ConversationTokenizer
from megatron_dattn.data.templates import TEMPLATES, read_template
from megatron_dattn.data.tokenizer import load_tokenizer, own_chat_template
from megatron_dattn.errors import ConfigError
from tests.unit.data.builders import conversation, make_tokenizer
from tests.unit.data.test_template_families import answers, texts

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What each family's published template writes, in our own words: name, special tokens (first and
# last ones in front), template, text in front of an answer that the model writes, and behind it.
FAMILIES: dict[str, tuple[list[str], str, str, str]] = {
    # SmolLM2 and Qwen2 open with a system message of their own where there is none.
    "smollm2": (
        ["<|im_start|>", "<|im_end|>"],
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe of help.<|im_end|>\n"
        "{% endif %}" + CHATML,
        "",
        "<|im_end|>",
    ),
    # The last answer follows an empty thought, the earlier ones follow none.
    "qwen3": (
        ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "",
        "<|im_end|>",
    ),
    # The system message goes to the last question.
    "mistral": (
        ["<s>", "</s>", "[INST]", "[/INST]"],
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
        "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if m.role == 'user' %}[INST] "
        "{% if s is defined and loop.index0 >= turns | length - 2 %}{{ s + '\n\n' }}{% endif %}"
        "{{ m.content }}[/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}"
        "{% endfor %}",
        " ",
        "</s>",
    ),
    "llama2": (
        ["<s>", "</s>"],
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% elif m.role == 'user' %}{{ bos_token }}[INST] {{ m.content.strip() }} [/INST]"
        "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}",
        " ",
        " </s>",
    ),
    # It writes today's date.
    "llama3": (
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
        "Today Date: {{ strftime_now('%d %b %Y') }}\n\n"
        "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
        "{% set messages = messages[1:] %}{% endif %}<|eot_id|>"
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "",
        "<|eot_id|>",
    ),
    "gemma": (
        ["<bos>", "<end_of_turn>", "<start_of_turn>"],
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "",
        "<end_of_turn>",
    ),
    "phi3": (
        ["<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ bos_token }}{% endif %}",
        "",
        "<|end|>",
    ),
    "vicuna": (
        ["<s>", "</s>"],
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} "
        "{% elif m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        " ",
        "</s>",
    ),
    # The prompt, where there is one, ends in the space in front of the answer.
    "spaced": (
        ["<s>", "</s>"],
        "{{ bos_token }}{% for m in messages %}"
        "{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}"
        "{{ m.content }}{{ ' ' if m.role == 'user' else eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}",
        " ",
        "</s>",
    ),
    # The prompt ends before the line break in front of an answer; roles are no special tokens.
    "olmo": (
        ["<|endoftext|>"],
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "\n",
        "<|endoftext|>",
    ),
}
every_family = pytest.mark.parametrize("family", list(FAMILIES))


def family_tokenizer(special: list[str], template: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with these special tokens and this chat template."""
    names = ["<unk>", *special, "<image>"]
    tokenizer = make_tokenizer(names, bos=special[0], eos=special[min(1, len(special) - 1)])
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {name: family_tokenizer(f[0], f[1]) for name, f in FAMILIES.items()}


def marked(template: ModelTemplate | ConversationTokenizer, chat: Conversation) -> str:
    """The rendered text with the supervised spans in double square brackets."""
    text, spans = template.render(chat)
    for start, end in reversed(spans):
        text = f"{text[:start]}[[{text[start:end]}]]{text[end:]}"
    return text


def test_the_last_answer_s_lead_is_the_model_s_own_to_write() -> None:
    template = ModelTemplate(TOKENIZERS["qwen3"])
    assert marked(template, conversation("q1", "a1", "q2", "a2")) == (
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n[[a1<|im_end|>]]\n"
        "<|im_start|>user\nq2<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\n\n</think>\n\na2<|im_end|>]]\n"
    )


def test_a_system_message_that_moves_to_the_last_question() -> None:
    template = ModelTemplate(TOKENIZERS["mistral"])
    assert marked(template, conversation("q1", "a1", "q2", "a2", system="Be brief.")) == (
        "<s>[INST] q1[/INST][[ a1</s>]][INST] Be brief.\n\nq2[/INST][[ a2</s>]]"
    )


@settings(deadline=None)
@given(
    st.sampled_from(list(FAMILIES)),
    st.lists(st.tuples(texts, answers), min_size=1, max_size=3),
    st.booleans(),
)
def test_the_supervised_tokens_spell_the_answers(
    family: str, exchanges: list[tuple[str, str]], with_image: bool
) -> None:
    spoken = [text for exchange in exchanges for text in exchange]
    if with_image:
        spoken[0] = f"<image>\n{spoken[0]}"
    chat = conversation(*spoken, images=int(with_image))
    _, _, lead, close = FAMILIES[family]
    tokenizer = TOKENIZERS[family]
    template = ConversationTokenizer(tokenizer, "model")
    text, spans = template.render(chat)
    leads = [lead] * len(spans)
    if family == "qwen3":
        leads[-1] = "<think>\n\n</think>\n\n"
    assert [text[start:end] for start, end in spans] == [
        f"{lead}{answer}{close}" for lead, answer in zip(leads, chat.answers, strict=True)
    ]
    assert template.end_token == close.strip()
    end = tokenizer.convert_tokens_to_ids(close.strip())
    pieces: list[list[int]] = [[]]
    for label in template(chat).labels:
        if label != IGNORED_LABEL:
            pieces[-1].append(label)
        if label == end:
            pieces.append([])
    assert pieces.pop() == []
    decoded = [tokenizer.decode(p, clean_up_tokenization_spaces=False) for p in pieces]
    # The decoder of sentencepiece-like tokenizers strips one space in front.
    assert decoded == [
        f"{lead.removeprefix(' ')}{answer}{close}"
        for lead, answer in zip(leads, chat.answers, strict=True)
    ]


@every_family
def test_a_prompt_is_the_beginning_of_its_training_records(family: str) -> None:
    template = ConversationTokenizer(TOKENIZERS[family], "model")
    chat = conversation("<image>\nwhat ?", "a square", "where ?", "left", images=1)
    whole = template(chat)
    prompt = template.prompt(Conversation(chat.turns[:3], chat.images))
    length = len(prompt.input_ids)
    assert prompt.input_ids == whole.input_ids[:length]
    assert prompt.image_offsets == whole.image_offsets
    answer = whole.labels[length - 1 :]
    end = TOKENIZERS[family].convert_tokens_to_ids(template.end_token)
    assert IGNORED_LABEL not in answer[: answer.index(end)]


@every_family
def test_a_prompt_is_what_transformers_makes(family: str) -> None:
    """Answers begin where the template itself ends its prompts, so that an export's users, who
    know nothing of training, ask as training did."""
    if family in ("llama3", "spaced"):  # today's date; a space that belongs to the answer's word
        return
    tokenizer = TOKENIZERS[family]
    chat = conversation("what ?", "a square", "where ?", "left")
    asked = Conversation(chat.turns[:3], chat.images)
    theirs = str(
        tokenizer.apply_chat_template(asked.messages, tokenize=False, add_generation_prompt=True)
    )
    ids = ConversationTokenizer(tokenizer, "model").prompt(asked).input_ids
    own = tokenizer.backend_tokenizer.encode(theirs, add_special_tokens=False).ids
    if family == "phi3":  # it closes what it takes for a whole text
        assert theirs.endswith("<|assistant|>\n")
    assert ids == own


@every_family
def test_control_tokens_in_text_are_refused(family: str) -> None:
    for token in FAMILIES[family][0]:
        with pytest.raises(SampleError) as caught:
            ConversationTokenizer(TOKENIZERS[family], "model")(conversation(f"a {token} b", "a"))
        assert caught.value.reason == Reason.CONTROL_TOKEN


@pytest.mark.parametrize("family", ["llama2", "gemma"])
def test_a_system_message_that_the_template_refuses(family: str) -> None:
    template = ConversationTokenizer(TOKENIZERS[family], "model")
    with pytest.raises(SampleError, match="no system") as caught:
        template(conversation("q", "a", system="Be brief."))
    assert caught.value.reason == Reason.TEMPLATE


def test_an_answer_that_the_template_cuts() -> None:
    template = ConversationTokenizer(TOKENIZERS["qwen3"], "model")
    with pytest.raises(SampleError, match="changes the texts") as caught:
        template(conversation("q", "thoughts</think>answer"))
    assert caught.value.reason == Reason.TEMPLATE


def test_the_date_is_always_the_same() -> None:
    template = ModelTemplate(TOKENIZERS["llama3"])
    assert "Today Date: 26 Jul 2024\n" in template.render(conversation("q", "a"))[0]


def test_many_exchanges_are_looked_at_once() -> None:
    template = ModelTemplate(TOKENIZERS["smollm2"])
    renders = 0
    render = template._text

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal renders
        renders += 1
        return render(*args, **kwargs)

    template._text = counted  # type: ignore[method-assign]
    template.render(conversation(*["x"] * 2000))
    assert renders < 10
    template.render(conversation(*["y"] * 2000))
    assert renders < 11


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "plain"])
def test_blocks_of_a_template_say_what_is_supervised(name: str) -> None:
    """Our templates give the same spans as a tokenizer's own as under their names."""
    special = ["<s>", "</s>", *TEMPLATES[name].control]
    tokenizer = family_tokenizer(special, read_template(name))
    chat = conversation("<image>\nq1", "a1", "q2", "a2", images=1)
    own, named = (ConversationTokenizer(tokenizer, template) for template in ("model", name))
    assert marked(own, chat) == marked(named, chat)
    assert own(chat) == named(chat)
    assert own.end_token == (named.end_token or "</s>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template came with the tokenizer"),
        ({"tool_use": CHATML}, "no chat template came with the tokenizer"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "it would never stop"),
        ("{% for m in messages %}{{ m.words }}{% endfor %}</s>", "does not write each message"),
        ("{% for m in messages %}{{ 1 + m.content }}{% endfor %}", "cannot write this"),
        ("{{ raise_exception('not for chats') }}", "not for chats"),
        ("{% for m in messages %}", "cannot write this conversation"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}</s>"
            "{% endfor %}",
            "it would never stop",
        ),
        (  # blocks that never come, and messages in parts alone, as LLaVA's processor has them
            "{% for m in messages %}{% if false %}{% generation %}x{% endgeneration %}{% endif %}"
            "{{ m.content }}</s>{% endfor %}",
            "it would never stop",
        ),
        (
            "{% for m in messages %}{% generation %}{% for part in m.content if part.type %}"
            "{{ part.text }}{% endfor %}{% endgeneration %}</s>{% endfor %}",
            "does not write each message",
        ),
        ("{{ strftime_now('%-d') }}{% for m in messages %}{{ m.content }}</s>{% endfor %}", "date"),
    ],
)
def test_templates_that_cannot_be_used(template: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConversationTokenizer(family_tokenizer(["<s>", "</s>"], template), "model")


def test_of_several_templates_the_default_is_taken() -> None:
    tokenizer = family_tokenizer(["<s>", "</s>"], {"default": CHATML, "tool_use": "x"})
    assert own_chat_template(tokenizer) == CHATML


def test_another_template_is_another_stream_of_tokens() -> None:
    one, other = (
        ConversationTokenizer(family_tokenizer(["<|im_end|>", "<|im_start|>"], source), "model")
        for source in (CHATML, CHATML + " ")
    )
    assert one.identity.startswith("model (")
    assert one.identity != other.identity
    assert (
        ConversationTokenizer(family_tokenizer(["<s>", "</s>"], None), "plain").identity == "plain"
    )


def test_a_tokenizer_without_a_first_token(tmp_path: Path) -> None:
    """Qwen's have none; its own template needs none, ours do."""
    tokenizer = family_tokenizer(["<|im_end|>", "<|im_start|>"], CHATML)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), template="model")
    chat = conversation("q", "a")
    assert marked(ConversationTokenizer(loaded, "model"), chat).endswith("\n[[a<|im_end|>]]\n")
    with pytest.raises(ConfigError, match="lacks a bos_token"):
        load_tokenizer(str(tmp_path), template="vicuna_v1")


@pytest.mark.parametrize("prompted", [True, False])
def test_the_first_word_of_an_answer_is_learned_with_its_space(prompted: bool) -> None:
    """Byte-level tokenizers make a word and the space in front of it one token."""
    source = FAMILIES["spaced"][1]
    if not prompted:
        source = source[: source.index("{% if add_generation_prompt")]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = ["USER: is it red", "ASSISTANT: red square", "USER: what x"]
    special = ["<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(words * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=source
    )
    template = ConversationTokenizer(tokenizer, "model")
    chat = conversation("what", "red square")
    whole = template(chat)
    learned = [label for label in whole.labels if label != IGNORED_LABEL]
    assert tokenizer.decode(learned) == " red square</s>"
    prompt = template.prompt(Conversation(chat.turns[:1]))
    assert tokenizer.decode(prompt.input_ids) == "<s>USER: what ASSISTANT:"
    assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids

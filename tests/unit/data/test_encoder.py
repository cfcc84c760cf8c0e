"""Text within the budgets: cut where it should be, and not tokenised where it cannot fit."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_dattn.data import template
from megatron_dattn.data.conversation import Conversation, Turn, parse_record
from megatron_dattn.data.encoder import SampleEncoder
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.problems import LENGTH_PROBLEMS
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.template import ConversationTokenizer, TextTokens
from tests.unit.data.builders import CORPUS, SPECIAL_TOKENS, make_tokenizer, record
from tests.unit.data.test_template_families import TOKENIZERS

TEMPLATES = {
    name: ConversationTokenizer(tokenizer, name)
    for name, tokenizer in {
        "mistral_v3": make_tokenizer(),
        "plain": make_tokenizer(),
        **TOKENIZERS,
    }.items()
}
every_template = pytest.mark.parametrize("name", TEMPLATES)


def encoder(name: str, *, text: int, visual: int = 8, truncate: bool = True) -> SampleEncoder:
    return SampleEncoder(
        tokenizer=TEMPLATES[name],
        preprocessor=ImagePreprocessor(16),
        grid=(2, 2),
        visual_budget=visual,
        text_budget=text,
        truncate=truncate,
    )


def one_exchange_less_until_it_fits(
    encoder: SampleEncoder, conversation: Conversation
) -> tuple[TextTokens, Conversation]:
    """The slow way, which tokenises everything first."""
    while True:
        records = encoder.tokenizer(conversation)
        if len(records.input_ids) > encoder.text_budget:
            reason = Reason.TOO_MUCH_TEXT
        elif len(records.image_offsets) * 4 > encoder.visual_budget:
            reason = Reason.TOO_MANY_IMAGES
        else:
            return records, conversation
        if not encoder.truncate or conversation.num_exchanges == 1:
            raise SampleError(reason, "")
        conversation = conversation.first_exchanges(conversation.num_exchanges - 1)


def outcome(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except SampleError as error:
        return error.reason


words = st.lists(
    st.sampled_from(
        [*CORPUS[0].split(), "\u4e2d", " ", "\n\n", "[INST", "INST]", "</s", "s>", "_"]
    ),
    max_size=12,
).map(" ".join)
controls = st.sampled_from([*SPECIAL_TOKENS[1:-1], "<eos>", "<|eot_id|>"])
endings = st.integers(0, 30).flatmap(lambda drawn: controls if drawn == 30 else st.just("x"))
questions = st.tuples(st.sampled_from(["", "", "<image>", "<image><image>"]), words).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    turns: list[dict[str, str]] = []
    for _ in range(draw(st.integers(1, 9))):
        turns += [
            {"from": "human", "value": draw(questions)},
            {"from": "gpt", "value": draw(words) + draw(endings)},
        ]
    images = sum(turn["value"].count("<image>") for turn in turns)
    system = draw(st.none() | words)
    return parse_record(
        {"conversations": turns, "image": [f"{i}.png" for i in range(images)], "system": system}
    )


@every_template
@settings(deadline=None, max_examples=40)
@given(
    chat=conversations(),
    text=st.integers(1, 250),
    visual=st.sampled_from([4, 8, 24, 72]),
    truncate=st.booleans(),
)
def test_what_is_kept_is_what_one_exchange_less_until_it_fits_keeps(
    name: str, chat: Conversation, text: int, visual: int, truncate: bool
) -> None:
    fast = encoder(name, text=text, visual=visual, truncate=truncate)
    expected = outcome(one_exchange_less_until_it_fits, fast, chat)
    found = outcome(fast.text_tokens, chat)
    if expected == Reason.CONTROL_TOKEN and found != expected:
        # It stands where nothing is looked at, because so much text cannot fit.
        assert chat.num_exchanges > text or fast._certain_excess(chat)
        expected = outcome(lambda: one_exchange_less_until_it_fits(fast, fast._bounded(chat)))
    limits = (Reason.TOO_MUCH_TEXT, Reason.TOO_MANY_IMAGES)
    assert found == expected or (found in limits and expected in limits)


@every_template
def test_a_conversation_that_just_fits_is_never_refused_by_its_length(name: str) -> None:
    """Of the longest tokens that there are, as many as the budget has room for."""
    tokenizer = TEMPLATES[name]
    backend = tokenizer._backend
    special = tokenizer._special_ids
    longest = max(
        (
            token
            for token, i in backend.get_vocab().items()
            if i not in special and "<0x" not in token
        ),
        key=lambda token: (len(token), token),
    ).replace("\u2581", " ")
    for repeats in (1, 10, 50):
        chat = Conversation((Turn("user", "q"), Turn("assistant", "x" + longest * repeats)))
        budget = len(tokenizer(chat).input_ids)
        assert len(encoder(name, text=budget).text_tokens(chat)[0].input_ids) == budget
        with pytest.raises(SampleError, match="text tokens exceed"):
            encoder(name, text=budget - 1).text_tokens(chat)


class Untouched(ConversationTokenizer):
    """Fails if it has to tokenise much."""

    def _tokenise(self, conversation: Conversation) -> Any:
        assert sum(len(turn.text) for turn in conversation.turns) < 20_000
        return super()._tokenise(conversation)


@pytest.fixture(scope="module")
def untouched() -> Untouched:
    return Untouched(make_tokenizer(), "mistral_v3")


def limited(tokenizer: ConversationTokenizer, *, truncate: bool) -> SampleEncoder:
    return SampleEncoder(
        tokenizer,
        ImagePreprocessor(16),
        (2, 2),
        visual_budget=16,
        text_budget=64,
        truncate=truncate,
    )


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (record("q", "ab" * 10**6), Reason.TOO_MUCH_TEXT),
        (record("ab" * 10**6, "x"), Reason.TOO_MUCH_TEXT),
        ({**record("q", "x"), "system": "ab" * 10**6}, Reason.TOO_MUCH_TEXT),
        (record("<image>" * 10**5, "x", ["a.png"] * 10**5), Reason.TOO_MANY_IMAGES),
    ],
    ids=["answer", "question", "system", "images"],
)
def test_what_cannot_fit_is_not_tokenised(
    untouched: Untouched, value: Any, reason: Reason, truncate: bool
) -> None:
    with pytest.raises(SampleError) as caught:
        limited(untouched, truncate=truncate).text_tokens(parse_record(value))
    assert caught.value.reason == reason
    assert "data." in str(caught.value)


@pytest.mark.parametrize("later", [record("q", "ab" * 10**6), record("<image>" * 10**5, "x")])
def test_what_is_cut_off_is_not_tokenised(untouched: Untouched, later: Any) -> None:
    turns = [*record("q", "a")["conversations"], *record("r", "b")["conversations"]]
    chat = parse_record(
        {
            "conversations": [*turns, *later["conversations"]],
            "image": ["a.png"] * later["conversations"][0]["value"].count("<image>"),
        }
    )
    kept, beginning = limited(untouched, truncate=True).text_tokens(chat)
    assert kept == untouched(chat.first_exchanges(2))
    assert beginning.images == ()
    assert len(beginning.fixed & LENGTH_PROBLEMS) == len(beginning.fixed) == 1
    with pytest.raises(SampleError):
        limited(untouched, truncate=False).text_tokens(chat)


def test_many_exchanges_are_cut_with_few_passes(untouched: Untouched) -> None:
    """Not one pass for each exchange that is too many."""
    chat = parse_record({"conversations": record("q", "a")["conversations"] * 50_000})
    kept, _ = limited(untouched, truncate=True).text_tokens(chat)
    assert 50 < len(kept.input_ids) <= 64
    with pytest.raises(SampleError, match="50000 exchanges"):
        limited(untouched, truncate=False).text_tokens(chat)


def test_shapes_of_conversations_are_not_collected_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(template, "MAX_KNOWN_SHAPES", 4)
    tokenizer = ConversationTokenizer(make_tokenizer(), "mistral_v3")
    for length in range(1, 40):
        tokenizer(Conversation((Turn("user", "q"), Turn("assistant", "a")) * length))
        assert 1 <= len(tokenizer._expected) <= 4


def tiled(*, visual: int, truncate: bool = False, max_images: int | None = None) -> SampleEncoder:
    """Four visual tokens a square; wide images have three squares, tall ones five."""
    pinpoints = [[8, 16], [32, 8]]
    return SampleEncoder(
        TEMPLATES["mistral_v3"],
        ImagePreprocessor(8, image_fit="anyres", image_grid_pinpoints=pinpoints),
        (2, 2),
        visual_budget=visual,
        text_budget=200,
        truncate=truncate,
        max_images=max_images,
    )


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    Image.new("RGB", (40, 20), "red").save(tmp_path / "wide.png")
    Image.new("RGB", (20, 80), "blue").save(tmp_path / "tall.png")
    return str(tmp_path)


ASKED_TWICE = {
    "image": ["wide.png", "tall.png", "wide.png"],
    "conversations": [
        *record("<image> and <image>?", "red and blue")["conversations"],
        *record("and <image>?", "red")["conversations"],
    ],
}


def test_every_tile_has_its_image_s_place_in_the_text(pictures: str) -> None:
    chat = parse_record(ASKED_TWICE)
    plain, whole = tiled(visual=200).text_tokens(chat)
    first, second, third = plain.image_offsets
    tokens, same = tiled(visual=44).text_tokens(chat, pictures)
    assert (tokens.input_ids, tokens.labels, same) == (plain.input_ids, plain.labels, whole)
    assert tokens.image_offsets == (first,) * 3 + (second,) * 5 + (third,) * 3
    sample = tiled(visual=44)(chat, pictures)
    assert sample.image_offsets == tokens.image_offsets
    colours = [tuple(square.reshape(-1, 3).max(0)) for square in sample.images]
    assert colours == [(255, 0, 0)] * 3 + [(0, 0, 255)] * 5 + [(255, 0, 0)] * 3


def test_tiles_count_before_an_image_is_decoded(
    pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    chat = parse_record(ASKED_TWICE)
    with pytest.raises(SampleError, match="11 images and tiles make 44 visual tokens") as caught:
        tiled(visual=43)(chat, pictures)
    assert caught.value.reason == Reason.TOO_MANY_IMAGES
    tokens, kept = tiled(visual=43, truncate=True).text_tokens(chat, pictures)
    assert kept.fixed == {Reason.TOO_MANY_IMAGES}
    assert (kept.images, len(tokens.image_offsets)) == (("wide.png", "tall.png"), 8)
    with pytest.raises(SampleError, match="8 images and tiles make 32 visual tokens"):
        tiled(visual=31, truncate=True).text_tokens(chat, pictures)


def test_an_image_that_changes_while_it_is_read_is_refused(
    pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = parse_record(record("<image>?", "red", "wide.png"))
    monkeypatch.setattr(ImagePreprocessor, "num_squares", lambda *_: 2)
    with pytest.raises(SampleError, match="changed while it was read") as caught:
        tiled(visual=44)(chat, pictures)
    assert caught.value.reason == Reason.BROKEN_IMAGE


def test_the_number_of_images_has_a_limit_of_its_own(pictures: str) -> None:
    chat = parse_record(ASKED_TWICE)
    with pytest.raises(SampleError, match="3 images, more than data") as caught:
        tiled(visual=200, max_images=2).text_tokens(chat)
    assert caught.value.reason == Reason.TOO_MANY_IMAGES
    assert str(caught.value).endswith("data.max_images_per_sample 2")
    assert tiled(visual=200, max_images=3).text_tokens(chat)[1] == chat
    _, kept = tiled(visual=200, max_images=2, truncate=True).text_tokens(chat)
    assert kept.images == chat.images[:2]
    text_only = parse_record(record("why?", "so"))
    assert tiled(visual=200, max_images=0).text_tokens(text_only)[1] == text_only

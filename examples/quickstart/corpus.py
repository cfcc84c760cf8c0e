"""The demo's language as plain strings: captions and conversations of random scenes, no pictures.

The strings have the form in which the training stages will show them (Mistral v0.3's instruction
format), so the tokenizer meets the words and the language model meets the control tokens.
"""

import random
from collections.abc import Iterator

from examples.quickstart.language import (
    Turn,
    dense_caption,
    sample_turns,
    short_caption,
    text_only_turn,
)
from examples.quickstart.scenes import sample_scene

MAX_TURNS = 4


def format_conversation(turns: list[Turn]) -> str:
    """Mistral v0.3's text of a conversation, without the leading `<s>`."""
    return "".join(f"[INST] {turn.question}[/INST] {turn.answer}</s>" for turn in turns)


def sentences(seed: int, grid: int, num_scenes: int) -> Iterator[str]:
    """Bare sentences for the tokenizer: captions, questions and answers, no control tokens."""
    rng = random.Random(f"tokenizer/{seed}/{grid}")
    for _ in range(num_scenes):
        scene = sample_scene(rng, grid)
        yield short_caption(scene, rng)
        yield dense_caption(scene, rng)
        for turn in (*sample_turns(scene, 2, rng), text_only_turn(rng)):
            yield turn.question
            yield turn.answer


def language_texts(seed: int, grid: int) -> Iterator[str]:
    """An endless stream of texts for the language model, each one document after `<s>`.

    Captions end with a line feed and conversations with `</s>`, as in the stages. About scenes
    that nobody shows, answers can only be guessed: what is learned is the language.
    """
    rng = random.Random(f"language/{seed}/{grid}")
    while True:
        scene = sample_scene(rng, grid)
        yield short_caption(scene, rng) + "\n"
        yield dense_caption(scene, rng) + "\n"
        yield format_conversation(sample_turns(scene, rng.randint(1, MAX_TURNS), rng))
        yield format_conversation([text_only_turn(rng) for _ in range(rng.randint(1, MAX_TURNS))])

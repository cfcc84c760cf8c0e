"""Tokens that grow behind a pack see what they would see if the pack had been laid out with
them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dattn.attention import PRESETS, ImageSpan, TokenLayout, token_positions
from megatron_dattn.attention.backends.cpu_flash import CpuFlashBackend
from megatron_dattn.attention.decomposed import attend_images, attend_scored_tokens
from megatron_dattn.attention.plan.decode import next_positions, plan_decode_step
from megatron_dattn.attention.reference import reference_attention
from tests.unit.attention.support import CONFIGS, SCORES, layouts, make_problem


def longer_by(layout: TokenLayout, tokens: list[int]) -> TokenLayout:
    lengths = tuple(n + more for n, more in zip(layout.text_lengths, tokens, strict=True))
    return replace(layout, text_lengths=lengths, text_budget=layout.text_budget + sum(tokens))


def tokens_of_growth(layout: TokenLayout, longer: TokenLayout, added: list[int]) -> list[int]:
    """For the pack's tokens and the added ones, in their order, the token of the longer layout."""
    tokens = list(range(layout.visual_budget))
    for sample in range(layout.num_samples):
        start, _ = longer.text_tokens(sample)
        tokens += range(start, start + layout.text_lengths[sample])
    tokens += [0] * (layout.num_tokens - len(tokens))  # padding, which nobody reads
    grown = list(layout.text_lengths)
    for sample in added:
        tokens.append(longer.text_tokens(sample)[0] + grown[sample])
        grown[sample] += 1
    return tokens


@pytest.mark.parametrize("name", CONFIGS)
@given(layout=layouts(), data=st.data())
@settings(max_examples=15, deadline=None)
def test_each_new_token_is_as_in_the_longer_pack(
    name: str, layout: TokenLayout, data: st.DataObject
) -> None:
    config = CONFIGS[name]
    steps = [data.draw(st.integers(0, 3)) for _ in layout.text_lengths]
    window = data.draw(st.sampled_from([None, 1, 2, 4]))
    longer = longer_by(layout, steps)
    problem = make_problem(longer, config)
    options = {
        "score_function": SCORES,
        "gate": problem.gate,
        "head_mask": problem.head_mask,
    }
    everything = (*problem.inputs, longer, config, problem.rotary)
    expected = reference_attention(*everything, **options, window=window)
    if config.merge == "cascade":
        alone = reference_attention(*everything, **options, window=window, images_alone=True)
        expected = expected + alone
    added: list[int] = []
    for step in range(max(steps)):
        new = [sample for sample, count in enumerate(steps) if count > step]
        added += new
        tokens = tokens_of_growth(layout, longer, added)
        plan = plan_decode_step(layout, added, len(new), config, window=window)
        arguments = (
            problem.query[tokens[-len(new) :]],
            problem.key[tokens],
            problem.value[tokens],
            plan,
            (problem.rotary[0][tokens], problem.rotary[1][tokens]),
        )
        out = attend_scored_tokens(*arguments, **options, backend=CpuFlashBackend())
        if config.merge == "cascade":
            out = out + attend_images(*arguments, score_function=SCORES, backend=CpuFlashBackend())
        # Sums of float64 in another order, over at most some forty tokens.
        torch.testing.assert_close(out, expected[tokens[-len(new) :]], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
@given(layout=layouts())
@settings(max_examples=20, deadline=None)
def test_positions_go_on(preset: str, layout: TokenLayout) -> None:
    config = PRESETS[preset]
    longer = longer_by(layout, [2] * layout.num_samples)
    positions = token_positions(longer, config)
    for sample, position in enumerate(next_positions(layout, config)):
        end = longer.text_tokens(sample)[1]
        assert positions[end - 2 : end].tolist() == [position, position + 1]


def test_parts_are_named_as_in_a_pack_and_text_alone_has_no_t2v() -> None:
    layout = TokenLayout((3, 2), (ImageSpan(1, 1, (1, 2)),), visual_budget=2, text_budget=5)
    plan = plan_decode_step(layout, [0, 1, 1], 1, PRESETS["dattn"])
    assert [(part.name, part.key_lengths) for part in plan.parts] == [("T2V", (2,)), ("T2T", (4,))]
    assert (plan.num_tokens, plan.scored_tokens) == (10, (9, 10))
    alone = plan_decode_step(layout, [0], 1, PRESETS["dattn_sum"])
    assert [part.name for part in alone.parts] == ["T2T"]
    assert not alone.sees_images.any()
    with pytest.raises(AssertionError, match="would see each other"):
        plan_decode_step(layout, [0, 0], 2, PRESETS["dattn"])

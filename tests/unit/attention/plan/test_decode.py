"""Tokens that grow behind a pack see what they would see if the pack had been laid out with
them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.backends.cpu_flash import CpuFlashBackend
from megatron_dattn.attention.config import AttentionConfig
from megatron_dattn.attention.decode import SampleKeyValue, attend_newest, read_images
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.plan.decode import GrowingText, SampleTable, next_positions
from megatron_dattn.attention.positions import apply_rotary, token_positions
from megatron_dattn.attention.reference import reference_attention
from tests.unit.attention.support import CONFIGS, SCORES, Problem, layouts, make_problem


def longer_by(layout: TokenLayout, tokens: list[int]) -> TokenLayout:
    lengths = tuple(n + more for n, more in zip(layout.text_lengths, tokens, strict=True))
    return replace(layout, text_lengths=lengths, text_budget=layout.text_budget + sum(tokens))


def tokens_in(longer: TokenLayout, layout: TokenLayout) -> list[int]:
    """For each of the pack's tokens, the token of the longer layout."""
    tokens = list(range(layout.visual_budget))
    for sample, length in enumerate(layout.text_lengths):
        start, _ = longer.text_tokens(sample)
        tokens += range(start, start + length)
    return tokens + [0] * (layout.num_tokens - len(tokens))  # padding, which nobody reads


class Rows:
    """A layer's memory of a longer pack's tokens, of those in `layout` at first."""

    def __init__(
        self,
        layout: TokenLayout,
        longer: TokenLayout,
        config: AttentionConfig,
        problem: Problem,
        window: int | None,
    ) -> None:
        self.problem, self.config = problem, config
        pack = tokens_in(longer, layout)
        self.growth = GrowingText(layout, config, window=window)
        self.rotated = apply_rotary(problem.key, problem.rotary)
        keys = self.rotated if config.t2v.rotary else problem.key
        values = problem.value.detach().clone()
        if problem.head_mask is not None:
            values[: layout.visual_budget] *= problem.head_mask.unsqueeze(-1)
        visual, text = SampleTable.visual(layout), SampleTable.text(layout)
        self.images: SampleKeyValue | None = None
        if visual.num_columns:
            self.images = (visual.take(keys[pack]), visual.take(values[pack]))
        self.text = [text.take(self.rotated[pack]), text.take(problem.value[pack])]

    def keep(self, rows: list[int]) -> None:
        self.growth.keep(rows)
        self.text = [tokens[rows] for tokens in self.text]
        if self.images is not None:
            self.images = (self.images[0][rows], self.images[1][rows])

    def attend(self, tokens: list[int]) -> Tensor:
        """One more token of each sample: these of the longer pack."""
        problem, config = self.problem, self.config
        for number, of_all in enumerate((self.rotated, problem.value)):
            new = of_all[tokens].unsqueeze(1)
            self.text[number] = torch.cat((self.text[number], new), dim=1)
        self.growth.add_token()
        plan = self.growth.plan("cpu", torch.float64)
        groups = problem.key.shape[1]
        plain, rotated = (
            query[tokens].unflatten(1, (groups, -1))
            for query in (problem.query, apply_rotary(problem.query, problem.rotary))
        )
        apart = config.merge == "cascade"
        options: dict[str, Any] = {"score_function": SCORES, "backend": CpuFlashBackend()}
        out = attend_newest(
            rotated if config.t2v.rotary else plain,
            rotated,
            None if apart else self.images,
            (self.text[0], self.text[1]),
            plan,
            merge=config.merge,
            gate=problem.gate,
            **options,
        )
        if apart and self.images is not None:
            out = out + read_images(plain.flatten(1, 2), self.images, plan, **options)
        return out


@pytest.mark.parametrize("name", CONFIGS)
@given(layout=layouts(), data=st.data())
@settings(max_examples=15, deadline=None)
@torch.no_grad()
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
    caches = Rows(layout, longer, config, problem, window)
    running = list(range(layout.num_samples))
    for step in range(max(steps)):
        kept = [row for row, sample in enumerate(running) if steps[sample] > step]
        running = [running[row] for row in kept]
        caches.keep(kept)
        tokens = [longer.text_tokens(i)[0] + layout.text_lengths[i] + step for i in running]
        # Sums of float64 in another order, over at most some forty tokens.
        torch.testing.assert_close(caches.attend(tokens), expected[tokens], atol=1e-12, rtol=1e-12)


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


def test_equal_rows_are_views_and_short_ones_are_padded() -> None:
    images = (ImageSpan(0, 1, (1, 2)), ImageSpan(1, 0, (1, 2)))
    layout = TokenLayout((3, 1), images, visual_budget=4, text_budget=5)
    pack = torch.arange(9)
    visual, text = SampleTable.visual(layout), SampleTable.text(layout)
    assert visual.take(pack).tolist() == [[0, 1], [2, 3]]
    assert visual.take(pack).data_ptr() == pack.data_ptr()
    assert (text.num_columns, text.take(pack)[1, 0]) == (3, 7)
    growth = GrowingText(layout, PRESETS["dattn"])
    growth.add_token()
    plan = growth.plan("cpu", torch.float32)
    assert (plan.images_bias, plan.sees_images) == (None, None)
    assert plan.text_bias is not None
    hidden = plan.text_bias.isinf()[:, 0, 0].tolist()
    assert hidden == [[False] * 4, [False, True, True, False]]


def test_text_alone_has_no_visual_columns() -> None:
    layout = TokenLayout((2, 2), (), visual_budget=3, text_budget=4)
    assert SampleTable.visual(layout).take(torch.zeros(3, 5)).shape == (2, 0, 5)
    growth = GrowingText(layout, PRESETS["dattn"])
    growth.add_token()
    assert growth.plan("cpu", torch.float32).text_bias is None

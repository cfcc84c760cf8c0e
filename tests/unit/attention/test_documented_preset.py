"""The preset of docs/attention.md, taken from there, works without another edit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_dattn.attention import PRESETS, AttentionConfig, get_preset
from megatron_dattn.attention.backends.select import select_backend
from megatron_dattn.attention.config import Positions, TextToVisual
from megatron_dattn.attention.layers import layer_rules
from megatron_dattn.attention.plan.decode import next_positions
from megatron_dattn.attention.reference import pair_masks
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.planner.part_flops import attended_pairs
from tests.unit.attention.support import HEAD_DIM, RICH_LAYOUT, make_problem, run_fast, run_oracle
from tools.show_preset import main

PAGE = Path(__file__).parents[3] / "docs" / "attention.md"
NAMES = {"AttentionConfig": AttentionConfig, "Positions": Positions, "TextToVisual": TextToVisual}


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of the page's preset, which is one of PRESETS for the length of a test."""
    _, _, section = PAGE.read_text().partition("### Adding one")
    entry = section.partition("```python\n")[2].partition("```")[0]
    ((name, config),) = eval(f"{{{entry}}}", NAMES).items()
    assert name not in PRESETS
    monkeypatch.setitem(PRESETS, name, config)
    return name


@pytest.mark.parametrize("window", [None, 3])
def test_it_is_planned_as_the_oracle_says(documented: str, window: int | None) -> None:
    config = get_preset(documented)
    problem = make_problem(RICH_LAYOUT, config)
    backend = select_backend("cpu_flash", "cpu", torch.float64, HEAD_DIM)
    actual = run_fast(problem, RICH_LAYOUT, config, backend, window=window)
    expected = run_oracle(problem, RICH_LAYOUT, config, window=window)
    for got, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, exact, atol=1e-12, rtol=0)


def test_its_cost_is_that_of_its_mask(documented: str) -> None:
    config = get_preset(documented)
    seen, _ = pair_masks(RICH_LAYOUT, config)
    assert sum(attended_pairs(RICH_LAYOUT, config).values()) == int(seen.sum())


def test_it_is_drawn_with_its_cost(
    documented: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([documented, "--output", str(tmp_path / "picture.png")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{documented}: v2v causal, v2t prompt")
    assert "Modality-mutual attention, debiased." in shown
    assert f"\n{documented} " in shown


def test_a_model_file_may_name_it(documented: str) -> None:
    assert ModelConfig(attention=documented).tokens_per_image == 729
    assert len(layer_rules(get_preset(documented), 4, skip_unread=True)) == 4
    assert len(next_positions(RICH_LAYOUT, get_preset(documented))) == 4

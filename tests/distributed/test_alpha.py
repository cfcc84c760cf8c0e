"""alpha_V reported while training: the same under every layout, and what the attention computes."""

import math
from typing import Any

import pytest
import torch

from tests.support.distributed import run_distributed

PACKS = 4
PRESETS = ("dattn", "s_attn", "dattn_sum")

Reports = dict[str, list[list[float]]]  # alpha_V by preset, layer and head


def _packs() -> list:
    """One sample each: no image, one in front, two in the middle of the text, one after text."""
    from tests.support.vlm import make_batch

    places: tuple[tuple[int, ...], ...] = ((), (0,), (2, 5), (3,))
    return [make_batch([9 + i % 3], [places[i % 4]], seed=i) for i in range(2 * PACKS)]


def _train(settings: dict[str, Any]) -> Reports:
    """What the second of two steps reports, by preset."""
    from megatron_dattn.training.step import train_step
    from tests.support.training import build_run, leave, training_config

    settings = {"num_packs": PACKS, "train_iters": 2, "alpha_interval": 2, **settings}
    reports = {}
    for preset in PRESETS:
        run = build_run(training_config(attention=preset, **settings), _packs())
        first, second = (train_step(run).alpha for _ in range(2))
        assert first is None, "not due"
        assert second is not None
        reports[preset] = second
        leave()
    return reports


@pytest.fixture(scope="module")
def one_process() -> Reports:
    (reports,) = run_distributed(_train, 1, {})
    return reports


def test_every_head_of_every_layer_has_its_weight(one_process: Reports) -> None:
    for preset in PRESETS:
        weights = torch.tensor(one_process[preset])
        assert weights.shape == (2, 4), "layers, heads of the tiny model"
        # Random weights give no head all of the attention, nor none, and no two the same.
        assert weights.gt(0.01).all()
        assert weights.lt(0.99).all()
        assert weights.unique().numel() == 8


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {"recompute": "full"}),
        (2, {"tensor": 2, "recompute": "full"}),
        (2, {"pipeline": 2}),
        (2, {}),
    ],
    ids=["full", "tp2+sp-full", "pp2", "dp2"],
)
def test_layouts_report_alike(ranks: int, settings: dict[str, Any], one_process: Reports) -> None:
    for reports in run_distributed(_train, ranks, settings):
        for preset in PRESETS:
            expected = torch.tensor(one_process[preset])
            # fp32: the same scores after one optimizer step, summed in another order.
            torch.testing.assert_close(
                torch.tensor(reports[preset]), expected, atol=2e-5, rtol=0, msg=preset
            )


def _text_only() -> list[list[float]] | None:
    from megatron_dattn.training.step import train_step
    from tests.support.training import build_run, training_config
    from tests.support.vlm import make_batch

    run = build_run(training_config(alpha_interval=1), [make_batch([9])])
    return train_step(run).alpha


def test_without_images_there_is_nothing_to_report() -> None:
    (weights,) = run_distributed(_text_only, 1)
    assert weights is not None
    assert all(math.isnan(weight) for layer in weights for weight in layer)

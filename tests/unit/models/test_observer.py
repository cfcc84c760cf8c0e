"""Observers see what the layers attend with, and leave no trace."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dattn.attention.attention_maps import ReportInputs, alpha_v
from megatron_dattn.attention.backends.base import ScoreFunction
from megatron_dattn.attention.reading_order import reading_order
from megatron_dattn.models.decomposed_attention import DecomposedCore
from megatron_dattn.models.observer import AlphaMeter
from tests.support.vlm import LANGUAGE, make_batch, tiny_model, tiny_model_config

pytestmark = pytest.mark.usefixtures("one_process")

BATCH = make_batch([9, 5, 8], [(3,), (), (0, 5)])
PRESETS = ["dattn", "s_attn", "dattn_sum"]
# Equal samples: the CPU's kernels take ragged ones in padded batches, laid out by the host.
EVEN = make_batch([8, 8], [(3,), (3,)], budgets=(18, 16))


class Recorder:
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, Tensor, Tensor, ReportInputs]] = []

    def __call__(self, layer_number: int, query: Tensor, key: Tensor, inputs: ReportInputs) -> None:
        self.shown.append((layer_number, query, key, inputs))


@pytest.mark.parametrize("preset", PRESETS)
def test_it_is_shown_the_queries_and_keys_of_every_layer(preset: str) -> None:
    model = tiny_model(tiny_model_config(preset))
    recorder, attended = Recorder(), []
    for module in model.modules():
        if isinstance(module, DecomposedCore):
            module.register_forward_pre_hook(lambda _, args: attended.append(args[:2]))
    model(BATCH, observer=recorder)
    assert [number for number, *_ in recorder.shown] == [1, 2]
    for (_, query, key, inputs), (used_query, used_key) in zip(
        recorder.shown, attended, strict=True
    ):
        text = BATCH.layout.text_budget
        if model.knows_one_kind:  # the layers have reading order, the observer packed order
            places = reading_order(BATCH.layout).places
            used_query, used_key = used_query[places], used_key[places]
        assert torch.equal(query[-text:], used_query[-text:])
        assert torch.equal(key, used_key)
        assert not query.requires_grad
        assert not key.requires_grad
        assert inputs.score_function == ScoreFunction(LANGUAGE.head_dim**-0.5)
        assert alpha_v(query, key, inputs).shape == (text, LANGUAGE.num_attention_heads)


@pytest.mark.parametrize("preset", PRESETS)
def test_it_changes_no_loss_and_no_gradient(preset: str) -> None:
    results = []
    for observer in (None, Recorder()):
        model = tiny_model(tiny_model_config(preset))
        losses = model(BATCH, observer=observer)
        losses.sum().backward()
        results.append([losses, *(p.grad for p in model.parameters() if p.grad is not None)])
    for with_observer, without in zip(*results, strict=True):
        assert torch.equal(with_observer, without)


class Syncs(TorchDispatchMode):
    """Notes what would make a GPU wait for its host: reads of values, and shapes from values."""

    VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in self.VALUES or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def _syncs(model, observer, monkeypatch) -> list[str]:
    """Of one forward and backward pass; `tolist` and its like bypass the dispatcher on a CPU."""
    with Syncs() as syncs, monkeypatch.context() as patched:
        for name in ("tolist", "item", "cpu", "numpy"):
            original = getattr(torch.Tensor, name)
            patched.setattr(
                torch.Tensor,
                name,
                lambda self, *a, n=name, f=original: syncs.seen.append(n) or f(self, *a),
            )
        model(EVEN, observer=observer).sum().backward()
    return syncs.seen


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_meter_never_waits_for_the_device(preset: str, recompute: str, monkeypatch) -> None:
    model = tiny_model(tiny_model_config(preset), recompute=recompute)
    meter = AlphaMeter(2, LANGUAGE.num_attention_heads, "cpu")
    # The one place where the engine does: which tokens have a label.
    assert _syncs(model, None, monkeypatch) == ["nonzero"]
    assert _syncs(model, meter, monkeypatch) == ["nonzero"]
    assert meter.alpha.min() > 0


def test_the_instrument_notices_who_waits(monkeypatch) -> None:
    def wait(number: int, query: Tensor, key: Tensor, inputs: ReportInputs) -> None:
        query.sum().item()
        key[key > 0].tolist()

    model = tiny_model(tiny_model_config())
    seen = _syncs(model, wait, monkeypatch)
    assert {"item", "_local_scalar_dense", "index", "tolist"} <= set(seen)


def test_under_a_cascade_it_is_shown_the_cross_attention() -> None:
    """Its own queries, of text tokens, and keys, of visual tokens; a meter has no meaning there."""
    model = tiny_model(tiny_model_config("dattn_cascade"))
    recorder = Recorder()
    model(BATCH, observer=recorder)
    assert [number for number, *_ in recorder.shown] == [1, 2]
    for _, query, key, inputs in recorder.shown:
        assert query.shape[0] == BATCH.layout.text_budget
        assert key.shape[0] == BATCH.layout.visual_budget
        assert inputs.plan.merge == "cascade"


def test_the_meter_means_over_the_tokens_that_see_an_image() -> None:
    model = tiny_model(tiny_model_config("s_attn"))
    recorder, meter = Recorder(), AlphaMeter(2, LANGUAGE.num_attention_heads, "cpu")
    for batch in (BATCH, make_batch([7], [(2,)], seed=1)):
        model(batch, observer=recorder)
        model(batch, observer=meter)
    for layer in (1, 2):
        weights = [
            alpha_v(query, key, inputs)[inputs.plan.sees_images]
            for number, query, key, inputs in recorder.shown
            if number == layer
        ]
        # Text before its image sees none: 6 of 9 tokens, 8 of 8, 5 of 7 do.
        assert sum(len(rows) for rows in weights) == meter.counts[layer - 1] == 6 + 8 + 5
        expected = torch.cat(weights).mean(0)
        mean = meter.alpha[layer - 1] / meter.counts[layer - 1]
        # fp32 sums of 19 numbers below 1.
        torch.testing.assert_close(mean, expected, atol=1e-6, rtol=0)

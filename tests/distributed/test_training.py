"""The real training step under every layout: same losses, same weights, same decisions.

All runs start from the same weights and see the same samples, in fp32 on gloo ranks. Tolerances:
layouts differ only in the order of fp32 sums, about 1e-7 relative; after a few AdamW steps, whose
update is near sign(gradient) for tiny gradients, single weights may differ by a good part of one
learning rate (1e-3), so weights are compared through the norm of the difference.
"""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dattn.config.training import ModuleLearningRates
from megatron_dattn.errors import DataError
from tests.support.distributed import run_distributed

STEPS = 3
PACKS = 4
MODULES = ("vision_model", "adapter", "language_model")
ADAPTER_ONLY = ModuleLearningRates(vision_model=0.0, adapter=1e-3, language_model=0.0)

Curve = list[tuple[float, float]]


def _packs(number: int) -> list:
    """Ragged packs of one sample each: no image, one, two in the middle of the text."""
    from tests.support.vlm import make_batch

    places: tuple[tuple[int, ...], ...] = ((), (0,), (2, 5), (3,))
    return [make_batch([9 + i % 3], [places[i % 4]], seed=i) for i in range(number)]


def _train(settings: dict[str, Any], steps: int = STEPS) -> tuple[Curve, dict[str, torch.Tensor]]:
    """Losses and gradient norms of some steps, and the whole model's weights afterwards."""
    from megatron_dattn.training.step import train_step
    from tests.support.training import build_run, training_config, whole_weights

    settings = {"num_packs": PACKS, "train_iters": steps, **settings}
    run = build_run(training_config(**settings), _packs(steps * settings["num_packs"]))
    reports = [train_step(run) for _ in range(steps)]
    assert not any(report.skipped for report in reports)
    return [(report.loss, report.grad_norm) for report in reports], whole_weights(run)


def _assert_same(found: tuple, expected: tuple, tolerance: float = 2e-5) -> None:
    for (loss, norm), (expected_loss, expected_norm) in zip(found[0], expected[0], strict=True):
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=10 * tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, weight in expected[1].items():
        difference = (found[1][name] - weight).norm() / weight.norm()
        assert difference < 10 * tolerance, name


@pytest.fixture(scope="module")
def one_process() -> tuple:
    (result,) = run_distributed(_train, 1, {})
    return result


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"tensor": 2}),
        (2, {"pipeline": 2}),
        (2, {}),
        (2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True}),
        (2, {"tensor": 2, "recompute": "full"}),
        (2, {"context_parallel_size": 2}),
        (4, {"context_parallel_size": 2, "use_distributed_optimizer": True}),
    ],
    ids=[
        *("tp2+sp", "pp2", "dp2", "dp2-distributed-overlapped", "tp2+sp-recompute"),
        *("cp2", "cp2-dp2-distributed"),
    ],
)
def test_layouts_train_alike(ranks: int, settings: dict[str, Any], one_process: tuple) -> None:
    for result in run_distributed(_train, ranks, settings):
        _assert_same(result, one_process)


def _accumulated_and_whole() -> tuple:
    """The same four samples as four micro-batches, and as one pack."""
    from megatron_dattn.training.step import train_step
    from tests.support.training import build_run, leave, training_config, whole_weights
    from tests.support.vlm import make_batch

    lengths, places = [9, 10, 11, 9], [(), (0,), (2, 5), (3,)]
    results = []
    for packs in (
        [
            make_batch([length], [place], budgets=(36, 48), first_sample=i)
            for i, (length, place) in enumerate(zip(lengths, places, strict=True))
        ],
        [make_batch(lengths, places, budgets=(36, 48))],
        [
            make_batch(lengths[:3], places[:3], budgets=(36, 48)),
            make_batch(lengths[3:], places[3:], budgets=(36, 48), first_sample=3),
        ],
    ):
        config = training_config(num_packs=len(packs), train_iters=1, text_budget=48)
        run = build_run(config, packs)
        report = train_step(run)
        results.append(([(report.loss, report.grad_norm)], whole_weights(run)))
        leave()
    return tuple(results)


def test_loss_and_update_do_not_depend_on_packing_or_accumulation() -> None:
    ((separate, together, mixed),) = run_distributed(_accumulated_and_whole, 1)
    _assert_same(together, separate)
    _assert_same(mixed, separate)


def _stage_one(settings: dict[str, Any]) -> tuple:
    from megatron_dattn.training.optimizer import parameter_groups
    from megatron_dattn.training.step import train_step
    from tests.support.training import build_run, training_config, whole_weights

    config = training_config(num_packs=PACKS, rates=ADAPTER_ONLY, **settings)
    run = build_run(config, _packs(2 * PACKS))
    before = whole_weights(run)
    for _ in range(2):
        train_step(run)
    trained = {group.module for group in parameter_groups(run.state.optimizer)}
    sharded = run.state.model.ddp_config.use_distributed_optimizer
    return before, whole_weights(run), trained, sharded


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(2, {"tensor": 2}), (2, {"pipeline": 2, "use_distributed_optimizer": True})],
    ids=["tp2+sp", "pp2-frozen-stage"],
)
def test_frozen_modules_do_not_move(ranks: int, settings: dict[str, Any]) -> None:
    for before, after, trained, sharded in run_distributed(_stage_one, ranks, settings):
        assert trained == {"adapter"}
        assert not sharded, "a frozen stage must switch the distributed optimizer off"
        for name, weight in before.items():
            if name.startswith("adapter."):
                assert not torch.equal(after[name], weight), name
            else:
                assert torch.equal(after[name], weight), name


def _first_step_sizes() -> dict[str, float]:
    """Largest change of each module's weights in AdamW's first step without decay."""
    from megatron_dattn.training.step import train_step
    from tests.support.training import ALL_RATES, build_run, training_config, whole_weights

    run = build_run(training_config(num_packs=PACKS), _packs(PACKS))
    before = whole_weights(run)
    train_step(run)
    after = whole_weights(run)
    largest = dict.fromkeys(MODULES, 0.0)
    for name, weight in before.items():
        module = name.partition(".")[0]
        change = (after[name] - weight).abs().max().item()
        largest[module] = max(largest[module], change / getattr(ALL_RATES, module))
    return largest


def test_each_module_trains_at_its_own_rate() -> None:
    """AdamW's first update is rate * gradient / |gradient|: exactly one rate per weight."""
    (sizes,) = run_distributed(_first_step_sizes, 1)
    for module in MODULES:
        assert sizes[module] == pytest.approx(1.0, rel=1e-2), module


def _with_bad_numbers(settings: dict[str, Any], kind: str, bad_steps: set[int], rank: int) -> tuple:
    """Train while one rank sees bad numbers in some steps; what it decided and how it ended."""
    import torch.distributed as dist

    from megatron_dattn.runtime.signals import SignalWatcher
    from megatron_dattn.training.exit_reason import NumericsError
    from megatron_dattn.training.trainer import train
    from tests.support.training import build_run, training_config, whole_weights

    settings = {"num_packs": PACKS, "train_iters": 5, "max_skipped_steps": 2, **settings}
    run = build_run(training_config(**settings), _packs(5 * PACKS))
    snapshots: list[dict[str, torch.Tensor]] = []

    def poison(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        bad = dist.get_rank() == rank and run.state.progress.step + 1 in bad_steps
        if not bad:
            return output
        if kind == "loss":
            return output * math.nan
        output.register_hook(lambda gradient: gradient * math.inf)  # the loss stays finite
        return output

    run.state.model.register_forward_hook(poison)
    record = run.metrics.record

    def remember(report: Any, totals: Any) -> None:
        snapshots.append({"skipped": report.skipped, **whole_weights(run)})
        record(report, totals)

    run.metrics.record = remember  # type: ignore[method-assign]
    try:
        ending: Any = train(run, SignalWatcher()).reason
    except NumericsError as error:
        ending = error.step
    return ending, snapshots, run.state.progress.skipped_steps


@pytest.mark.parametrize(
    ("settings", "kind", "rank"),
    [
        ({}, "loss", 1),
        ({}, "gradient", 0),
        ({"pipeline": 2}, "loss", 1),
        ({"pipeline": 2}, "gradient", 0),
        ({"precision": "bf16", "use_distributed_optimizer": True}, "gradient", 1),
    ],
    ids=["dp2-loss", "dp2-gradient", "pp2-loss", "pp2-gradient", "dp2-bf16-gradient"],
)
def test_bad_numbers_on_one_rank_skip_the_step_on_all(
    settings: dict[str, Any], kind: str, rank: int
) -> None:
    bad_steps = {2, 4}  # never two in a row: the run reaches its end
    results = run_distributed(_with_bad_numbers, 2, settings, kind, bad_steps, rank)
    for ending, snapshots, skipped in results:
        assert ending == "finished"
        assert skipped == 2
        assert [s.pop("skipped") for s in snapshots] == [False, True, False, True, False]
        for step in bad_steps:
            _assert_equal(snapshots[step - 1], snapshots[step - 2])
        assert all(weight.isfinite().all() for weight in snapshots[-1].values())
        _assert_equal(snapshots[-1], results[0][1][-1])


def _with_a_full_disk_below_one_ledger(folder: str) -> tuple[str, int]:
    import torch.distributed as dist

    from megatron_dattn.errors import UserError
    from megatron_dattn.runtime.append_file import AppendFile
    from megatron_dattn.runtime.signals import SignalWatcher
    from megatron_dattn.training.sample_ledger import SampleLedger
    from megatron_dattn.training.trainer import train
    from tests.support.training import build_run, training_config

    config = training_config(num_packs=PACKS, train_iters=3, sample_ledger=folder)
    run = build_run(config, _packs(3 * PACKS))
    run.ledger = SampleLedger(folder, dist.get_rank(), resumed_step=0)
    if dist.get_rank() == 1:
        run.ledger._file = AppendFile("/dev/full")
    with pytest.raises(UserError) as failure:
        train(run, SignalWatcher())
    run.close()
    return str(failure.value), run.state.progress.step


def test_a_full_disk_below_one_ledger_stops_all_ranks_after_that_step(tmp_path: Path) -> None:
    first, second = run_distributed(_with_a_full_disk_below_one_ledger, 2, str(tmp_path))
    assert first == second
    message, step = first
    assert message.startswith("rank 1 (host ")
    assert "): writing the sample ledger failed: No space left on device" in message
    assert "'/dev/full'" in message
    assert step == 1


def _with_a_signal_before_the_first_step() -> tuple[str, int | None]:
    import os
    import signal

    import torch.distributed as dist

    from megatron_dattn.runtime.signals import SignalWatcher
    from megatron_dattn.training.trainer import train
    from tests.support.training import build_run, training_config

    with SignalWatcher() as signals:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        run = build_run(training_config(num_packs=PACKS, train_iters=3), _packs(3 * PACKS))
        ending = train(run, signals)
    return ending.reason, ending.step


def test_a_signal_to_one_rank_before_the_first_step_stops_all_there() -> None:
    assert run_distributed(_with_a_signal_before_the_first_step, 2) == [("signal", 0)] * 2


def test_bad_numbers_that_persist_stop_the_run() -> None:
    for ending, snapshots, _ in run_distributed(_with_bad_numbers, 2, {}, "loss", {3, 4, 5}, 1):
        assert ending == 4, "two skipped steps in a row are the limit here"
        assert len(snapshots) == 4


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name in expected.keys() - {"skipped"}:
        assert torch.equal(found[name], expected[name]), name


def _loader_that_fails_on(rank: int, settings: dict[str, Any], outage: bool = False) -> str:
    import torch.distributed as dist

    from megatron_dattn.errors import OutageError, UserError
    from megatron_dattn.training.step import train_step
    from tests.support.training import build_run, training_config

    packs = _packs(4 if dist.get_rank() == rank else 8)  # too few for the third step
    run = build_run(training_config(num_packs=4, train_iters=3, **settings), packs)
    if outage and dist.get_rank() == rank:
        run.stream._source = _then_an_outage(packs, OutageError("the file system is gone"))
    try:
        for _ in range(3):
            train_step(run)
    except UserError as error:
        return f"{run.state.progress.step}: {type(error).__name__}: {error}"
    return "trained on"


def _then_an_outage(packs: list, error: Exception) -> Any:
    yield from packs
    raise error


@pytest.mark.parametrize(
    ("rank", "settings", "packs"),
    [(1, {}, "0 of 2"), (0, {"pipeline": 2}, "0 of 4"), (0, {"tensor": 2}, "0 of 4")],
    ids=["dp2", "pp2", "tp2"],
)
def test_an_error_of_one_loader_reaches_every_rank(
    rank: int, settings: dict[str, Any], packs: str
) -> None:
    first, second = run_distributed(_loader_that_fails_on, 2, rank, settings)
    assert first == second
    where = rf"1: DataError: rank {rank} \(host .+\): "
    assert re.match(f"{where}the training data gave {packs} packs", first)


def test_an_outage_of_the_rank_that_loads_reaches_every_pipeline_stage() -> None:
    first, second = run_distributed(_loader_that_fails_on, 2, 0, {"pipeline": 2}, True)
    assert first == second
    assert re.fullmatch(r"1: OutageError: rank 0 \(host .+\): the file system is gone", first)


def _with_and_without_validation(settings: dict[str, Any]) -> tuple:
    """Weights and random state of two runs, one of which validates, and its validation losses."""
    from megatron_dattn.training.step import train_step
    from megatron_dattn.training.validate import Validation
    from tests.support.training import PackLoader, build_run, leave, training_config, whole_weights

    outcomes = []
    losses: list[float] = []
    for validates in (False, True):
        run = build_run(training_config(num_packs=PACKS, **settings), _packs(3 * PACKS))
        loads = run.state.loader is not None
        validation = Validation(
            lambda loads=loads: PackLoader(_packs(3)) if loads else None,
            max_microbatches=5,
            seq_length=run.seq_length,
            max_skipped_fraction=0.1,
        )
        validation.require_packs()
        for _ in range(3):
            train_step(run)
            if validates:
                losses += [validation.loss(run.state.chunks), validation.loss(run.state.chunks)]
        outcomes.append((whole_weights(run), torch.get_rng_state()))
        leave()
    return outcomes, losses


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(1, {}), (2, {}), (2, {"pipeline": 2}), (2, {"tensor": 2})],
    ids=["one", "dp2", "pp2", "tp2"],
)
def test_validation_leaves_no_trace(ranks: int, settings: dict[str, Any]) -> None:
    results = run_distributed(_with_and_without_validation, ranks, settings)
    for ((weights, rng), (other_weights, other_rng)), losses in results:
        _assert_equal(other_weights, weights)
        assert torch.equal(rng, other_rng)
        assert losses[0] == losses[1]
        assert losses[0] != losses[2]
        assert losses == results[0][1]


def _outage_after_a_million_samples() -> tuple[int, str]:
    """Steps done, and the error: from the third step on half of 2000 samples per step are bad."""
    from megatron_dattn.data.skipped_samples import LoaderCounters
    from megatron_dattn.runtime.signals import SignalWatcher
    from megatron_dattn.training.trainer import train
    from tests.support.training import build_run, training_config

    run = build_run(training_config(train_iters=4), _packs(4))
    counts = ((1_000_000, 0), (1_002_000, 0), (1_004_000, 1000), (1_006_000, 2000))
    answers = iter(LoaderCounters(seen, {"missing_image": bad}) for seen, bad in counts)
    run.state.loader.counters = lambda: next(answers)  # type: ignore[method-assign,union-attr]
    try:
        train(run, SignalWatcher())
    except DataError as error:
        return run.state.progress.step, str(error)
    raise AssertionError("the outage was not noticed")


def test_an_outage_late_in_a_stage_stops_the_run() -> None:
    ((step, message),) = run_distributed(_outage_after_a_million_samples, 1)
    assert step == 2
    assert message.startswith("1000 of the last 4000 samples could not be used")

"""The ablation's table says how far seeds lie apart; it counts finished runs."""

import json
from pathlib import Path

from examples.quickstart.ablation import Result, finished, merge_into, table
from megatron_dattn.checkpoint.commit import save_checkpoint
from megatron_dattn.runtime.distributed import one_process


def _run(where: float, whole: float, loss: float) -> Result:
    return Result({"where": where, "all": whole}, loss)


def test_mean_spread_and_every_seed() -> None:
    results = {
        "dattn": {2: _run(70, 90, 0.2), 1: _run(50, 80, 0.1)},
        "s_attn": {1: _run(25, 50, 0.25)},
    }
    lines = table(results).splitlines()
    assert lines[0] == "| attention | where | all | each seed | validation loss |"
    assert lines[2:] == [
        "| `s_attn` | 25.0 ± 0.0 | 50.0 ± 0.0 | 50.0 | 0.250 ± 0.000 |",
        "| `dattn` | 60.0 ± 10.0 | 85.0 ± 5.0 | 80.0, 90.0 | 0.150 ± 0.050 |",
    ]


def test_a_run_that_is_not_evaluated_does_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "dattn" / "seed3"
    with one_process():
        facts = {"validation": {"step": 7, "loss": 0.5}}
        save_checkpoint(folder / "stage3", 7, {}, facts=facts)
    assert finished(tmp_path) == {}
    (folder / "accuracy.json").write_text(json.dumps({"all": {"accuracy": 0.75}}))
    assert finished(tmp_path) == {"dattn": {3: Result({"all": 75.0}, 0.5)}}


def test_runs_of_several_machines_come_together(tmp_path: Path) -> None:
    here, there = _run(50, 80, 0.1), _run(70, 90, 0.2)
    file = tmp_path / "results.json"
    assert merge_into(file, {"dattn": {1: here}}) == {"dattn": {1: here}}
    both = merge_into(file, {"dattn": {2: there}, "s_attn": {1: there}})
    assert both == {"dattn": {1: here, 2: there}, "s_attn": {1: there}}
    assert merge_into(file, {}) == both


def test_an_empty_folder_says_so() -> None:
    assert table({}) == "no finished run"

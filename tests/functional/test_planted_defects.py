"""A whole run over data with every defect planted ends well, and has used no planted record."""

import json
from pathlib import Path

import yaml

from megatron_dattn.checkpoint.discovery import find_checkpoint
from megatron_dattn.data.loader_state import load_state
from megatron_dattn.training.sample_ledger import read_ledger
from megatron_dattn.training.state import loader_file
from tests.functional.workspace import make_workspace, run_main
from tests.support.distributed import run_distributed
from tests.support.planted_defects import MAX_PIXELS, POLICIES, plant
from tools import prepare_data

RECORDS = 100


def _main(argv: list[str]) -> tuple[int, str]:
    return run_main(argv)


def test_planted_defects_neither_reach_nor_stop_training(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path, train_iters=12)
    planted = plant(tmp_path / "planted", RECORDS, each=1)
    source = tmp_path / "planted" / "set.json"
    source.write_text(json.dumps(planted.records))
    assert prepare_data.main([str(source), "--output", str(tmp_path / "planted")]) == 0
    data = {
        "max_image_pixels": MAX_PIXELS,
        "max_skipped_fraction": 1.0,
        "policies": POLICIES,
        "text_budget": 256,
    }
    settings = tmp_path / "planted.yaml"
    settings.write_text(yaml.safe_dump({"data": data}))
    flags = [*workspace.flags(), "--config", str(tmp_path / "planted" / "train.yaml")]
    assert run_distributed(_main, 1, [*flags, "--config", str(settings)]) == [(0, "")]

    packs = read_ledger(tmp_path / "run" / "ledger" / "samples-dp00000.jsonl")
    consumed = [key for step in packs.values() for pack in step for key in pack]
    numbers = [int(key.rpartition("-")[2]) for key in consumed]
    assert set(numbers) == set(range(RECORDS)) - planted.unused  # an epoch and more

    found = find_checkpoint(tmp_path / "run")
    assert found is not None
    progress = found.manifest.facts["progress"]
    counters = load_state((found.path / loader_file(0)).read_bytes())["counters"]
    assert progress["step"] == 12
    assert (
        progress["consumed_samples"]
        == len(consumed)
        == counters["seen"] - sum(counters["skipped"].values())
    )
    assert progress["skipped_samples"] == sum(counters["skipped"].values())
    assert progress["fixed_problems"] == sum(counters["fixed"].values())
    assert set(counters["skipped"]) == set(planted.skipped)
    assert set(counters["fixed"]) == set(planted.fixed)
    # What an epoch has of each, and of the next one no more than that.
    for counted, expected in (("skipped", planted.skipped), ("fixed", planted.fixed)):
        for problem, number in counters[counted].items():
            assert expected[problem] <= number <= 2 * expected[problem]

"""The sample ledger: whole lines, and no trace of steps that are done again."""

from pathlib import Path

from megatron_dattn.training.ledger import SampleLedger, read_ledger


def test_lines_reach_the_file_at_once(tmp_path: Path) -> None:
    ledger = SampleLedger(tmp_path / "ledger", 3, resumed_step=0)
    ledger.write(1, [["a", "b"], ["c"]])
    (path,) = (tmp_path / "ledger").iterdir()
    assert path.name == "samples-dp00003.jsonl"
    assert read_ledger(path) == {1: [["a", "b"], ["c"]]}
    ledger.close()


def test_a_resumed_run_drops_the_steps_it_does_again(tmp_path: Path) -> None:
    ledger = SampleLedger(tmp_path, 0, resumed_step=0)
    for step in (1, 2, 3):
        ledger.write(step, [[f"old{step}"]])
    ledger.close()
    path = tmp_path / "samples-dp00000.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "pac')  # a process died here
    resumed = SampleLedger(tmp_path, 0, resumed_step=2)
    resumed.write(3, [["new3"]])
    resumed.close()
    assert read_ledger(path) == {1: [["old1"]], 2: [["old2"]], 3: [["new3"]]}

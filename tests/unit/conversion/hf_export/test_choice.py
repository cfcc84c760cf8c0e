"""Which checkpoint of a run is exported, and under which name."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dattn.checkpoint.manifest import MANIFEST_FILE, read_manifest, write_manifest
from megatron_dattn.conversion.hf_export import run as export_hf
from megatron_dattn.conversion.hf_export.metrics import METRICS_FILE
from megatron_dattn.conversion.hf_export.run import ExportOptions, export_checkpoint
from tests.support.passes import Passes
from tests.support.run_folders import make_run_folder
from tests.unit.conversion.hf_models import save_language, save_vision
from tools.convert_checkpoint import main

STEPS = (200, 400)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of each step, which differ in what they remember."""
    base = tmp_path_factory.mktemp("choice")
    save_vision(base / "vision")
    save_language(base / "language")
    run = base / "stage3"
    make_run_folder(base, run, "dattn")
    first = run / "step-0000001"
    for step in STEPS:
        copy = Path(shutil.copytree(first, run / f"step-{step:07d}"))
        manifest = read_manifest(first)
        (copy / MANIFEST_FILE).unlink()
        facts = {**manifest.facts, "step": step, "validation": {"step": step, "loss": step / 1000}}
        write_manifest(copy, replace(manifest, step=step, facts=facts))
    shutil.rmtree(first)
    (run / METRICS_FILE).write_text('{"shapes": 0.75}')
    return run


@pytest.fixture
def read_from(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The checkpoints whose weights were read."""
    read: list[str] = []

    def open_tensors(path: Path):
        read.append(path.name)
        return original(path)

    original = export_hf.open_tensors
    monkeypatch.setattr(export_hf, "open_tensors", open_tensors)
    return read


def export(run: Path, output: Path, *more: str) -> int:
    return main(["export", "--checkpoint", str(run), "--output", str(output), *more])


@pytest.mark.parametrize(
    ("checkpoint", "more", "step"),
    [
        (".", [], 400),
        (".", ["--step", "400"], 400),
        (".", ["--step", "200"], 200),
        ("step-0000200", [], 200),
        ("step-0000200", ["--step", "200"], 200),
    ],
)
def test_the_newest_or_the_named_step(run, tmp_path, read_from, checkpoint, more, step):
    assert export(run / checkpoint, tmp_path / "model", *more) == 0
    assert read_from == [f"step-{step:07d}"]
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"validation loss at step {step}: 0.{step // 100}000" in card
    # The file in the run folder does not say of which step it is.
    assert ("shapes: 0.75" in card) == (step == max(STEPS))


def test_a_step_s_folder_by_a_path_that_ends_otherwise(run, tmp_path, read_from, monkeypatch):
    monkeypatch.chdir(run / "step-0000200")
    assert export(Path(), tmp_path / "model") == 0
    assert read_from == ["step-0000200"]


@pytest.mark.parametrize(
    ("checkpoint", "step", "message"),
    [
        (".", "300", r"holds no checkpoint of step 300; steps: 200, 400"),
        ("step-0000300", None, r"holds no checkpoint of step 300; steps: 200, 400"),
        ("step-0000400", "200", r"is the checkpoint of step 400, not of 200; name one"),
        ("../vision", "1", r"holds no config\.yaml"),
    ],
)
def test_a_step_that_is_not_there_is_one_line(run, tmp_path, checkpoint, step, message, capsys):
    more = [] if step is None else ["--step", step]
    assert export(run / checkpoint, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message.replace("\\", "") in error
    assert not list(tmp_path.iterdir())


def test_a_damaged_step_that_was_named_is_not_replaced(run, tmp_path, capsys):
    damaged = Path(shutil.copytree(run, tmp_path / "run"))
    path = damaged / "step-0000200" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    assert export(damaged, tmp_path / "out", "--step", "200") == 2
    error = capsys.readouterr().err
    assert "__0_0.distcp is damaged" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("more", "title"), [([], "model"), (["--name", "My model"], "My model")])
def test_the_card_is_headed_by_the_output_s_name_or_the_given_one(run, tmp_path, more, title):
    assert export(run, tmp_path / "model", *more) == 0
    assert f"\n# {title}\n" in (tmp_path / "model" / "README.md").read_text()


def test_an_export_tells_how_far_it_is(run, tmp_path):
    passes = Passes()
    export_checkpoint(run, tmp_path / "out", ExportOptions(max_shard_bytes=100_000), passes)
    passes.check("checking step-0000400", "exporting")
    (_, read, _), (_, written, _) = passes.seen
    assert read == sum(file.size for file in read_manifest(run / "step-0000400").files.values())
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert 0 < sum(shard.stat().st_size for shard in shards) - written < 4096 * len(shards)

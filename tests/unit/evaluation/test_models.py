"""A run and its exports answer alike, and each says who it is."""

import shutil
from pathlib import Path

import pytest

from megatron_dattn.conversion.hf_export.run import ExportOptions, export_checkpoint
from megatron_dattn.errors import CheckpointError, ConfigError
from megatron_dattn.evaluation.asking import batches
from megatron_dattn.evaluation.models import find_model
from megatron_dattn.evaluation.questions import read_questions
from megatron_dattn.runtime.distributed import destroy_distributed
from tests.support.run_folders import make_run_folder

pytestmark = pytest.mark.usefixtures("own_modules")


@pytest.fixture(scope="module", params=["dattn", "s_attn"])
def both(base: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A run and its export: our code, or a stock LLaVA."""
    run, export = base / f"run-{request.param}", base / f"hf-{request.param}"
    make_run_folder(base, run, request.param, norm="none")
    export_checkpoint(run, export, ExportOptions())
    return run, export


def test_a_run_and_its_export_give_the_same_answers(base: Path, both: tuple[Path, Path]) -> None:
    """In batches with questions of several lengths, with an image and without."""
    parts = batches(read_questions(base / "questions.jsonl"), 5)
    try:
        models = [find_model(folder).load() for folder in both]
        ours, theirs = ([model(part, 6) for part in parts] for model in models)
    finally:
        destroy_distributed()
    assert ours == theirs
    assert len({answer for part in ours for answer in part}) > 1


def test_a_model_has_its_own_identity(both: tuple[Path, Path], tmp_path: Path) -> None:
    run, export = both
    model = find_model(run)
    assert model.identity.startswith(f"{run.name}/step-0000001@")
    assert find_model(run / "step-0000001").identity == model.identity
    assert (model.template, find_model(run, "plain").template) == ("mistral_v3", "plain")
    copy = shutil.copytree(export, tmp_path / export.name)
    assert find_model(copy).identity == find_model(export).identity
    (weights, *_) = copy.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert find_model(copy).identity != find_model(export).identity


def test_a_truncated_export_is_one_error(both: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(both[1], tmp_path / both[1].name)
    (weights, *_) = copy.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    try:
        with pytest.raises(CheckpointError, match=r"transformers cannot load .*") as seen:
            find_model(copy).load()
    finally:
        destroy_distributed()
    assert "\n" not in str(seen.value)


def test_what_is_no_model_is_refused(both: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.yaml"):
        find_model(tmp_path)
    with pytest.raises(ConfigError, match="has its own template; leave it out"):
        find_model(both[1], "plain")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no safetensors"):
        find_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        find_model(tmp_path).load()
    destroy_distributed()

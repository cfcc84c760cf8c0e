"""Whatever goes wrong, an export says so in one error, and no folder looks like a whole one."""

import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from megatron_dattn.checkpoint.tensors import StoredTensor, open_tensors
from megatron_dattn.conversion.hf_export.run import export_checkpoint, plan_tensors
from megatron_dattn.errors import CheckpointError, UserError
from megatron_dattn.inference.load import find_run
from tests.support.distributed import RankError, run_distributed
from tests.support.run_folders import make_run_folder
from tests.unit.conversion.hf_models import save_language, save_vision


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("failures")
    save_vision(base / "vision")
    save_language(base / "language")
    make_run_folder(base, base / "run", "dattn")
    return base / "run"


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "run"))


def shorten(run: Path, name: str) -> None:
    path = run / "step-0000001" / name
    path.write_bytes(path.read_bytes()[:-100])


def flip(run: Path, name: str) -> None:
    path = run / "step-0000001" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(run: Path, name: str) -> None:
    (run / "step-0000001" / name).unlink()


def configure(run: Path, part: str, **changes: object) -> None:
    path = run / "config.yaml"
    content = yaml.safe_load(path.read_text())
    content["model"][part] |= changes
    path.write_text(yaml.safe_dump(content))


def choose_other_preset(run: Path) -> None:
    path = run / "config.yaml"
    content = yaml.safe_load(path.read_text())
    content["model"]["attention"] = "dattn_tanh"
    path.write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shorten(run, "__0_0.distcp"), r"__0_0\.distcp is damaged: \d+ bytes instead"),
        (lambda run: flip(run, "__0_0.distcp"), r"__0_0\.distcp is damaged: its sha256 differs"),
        (lambda run: remove(run, "__0_0.distcp"), r"__0_0\.distcp is missing"),
        (lambda run: shorten(run, ".metadata"), r"\.metadata is damaged"),
        (lambda run: shorten(run, "manifest.json"), r"manifest\.json is damaged"),
        (lambda run: remove(run, "manifest.json"), r"no manifest\.json"),
        (
            lambda run: configure(run, "language", vocab_size=128),
            r"config\.yaml does not.*model\.language\.vocab_size: this run has 128, .* 64",
        ),
        (
            lambda run: configure(run, "language", rope_theta=77.0, rms_norm_eps=1e-2),
            r"rms_norm_eps: this run has 0\.01.*rope_theta: this run has 77\.0, .* 1000\.0",
        ),
        (
            lambda run: configure(run, "vision", feature_layer=-3),
            r"model\.vision\.feature_layer: this run has -3, the checkpoint -2",
        ),
        (choose_other_preset, r"model\.attention: this run has 'dattn_tanh', .* 'dattn'"),
        (lambda run: (run / "tokenizer" / "tokenizer.json").unlink(), "tokenizer"),
    ],
)
def test_a_damaged_run_is_one_error_and_leaves_nothing(run, tmp_path, damage, message):
    damage(run)
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        export_checkpoint(run, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 128}, r"shape language_model\.embedding.*\[64, 48\]"),
        ({"num_hidden_layers": 3}, r"missing .*layers\.2\."),
        ({"num_hidden_layers": 1}, r"unknown .*layers\.1\."),
        ({"family": "gemma2"}, r"missing language_model.*post_attention_layernorm"),
    ],
)
def test_parameters_of_another_model_are_named(sound, changes, message):
    found, config = find_run(sound)
    other = replace(config.model, language=replace(config.model.language, **changes))
    with pytest.raises(CheckpointError, match=message):
        plan_tensors(open_tensors(found.path), other)


def test_a_field_that_changes_nothing_may_differ(run):
    configure(run, "language", max_position_embeddings=77)
    _, config = find_run(run)
    assert config.model.language.max_position_embeddings == 77


def test_as_many_values_in_another_shape_do_not_fit(sound):
    found, config = find_run(sound)
    stored = open_tensors(found.path)
    name = "language_model.decoder.layers.0.mlp.linear_fc2.weight"
    stored[name] = replace(stored[name], shape=stored[name].shape[::-1])
    with pytest.raises(CheckpointError, match=rf"of another shape {name} \[64, 48\]"):
        plan_tensors(stored, config.model)


def test_a_disk_that_fills_up_leaves_nothing(sound, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(
            CheckpointError, match=r"out cannot be written: .*File too large"
        ) as full:
            export_checkpoint(sound, tmp_path / "out")
        assert ".tmp-" not in str(full.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def die_between_tensors(run: Path, output: Path, survived: int) -> None:
    load, count = StoredTensor.load, 0

    def load_or_die(tensor: StoredTensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count > survived:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(tensor)

    with mock.patch.object(StoredTensor, "load", load_or_die):
        export_checkpoint(run, output)


@pytest.mark.parametrize("survived", [0, 17])
def test_a_killed_export_leaves_no_model_and_the_next_one_clears_up(
    sound, tmp_path, survived, caplog
):
    output = tmp_path / "out"
    with pytest.raises(RankError, match="died"):
        run_distributed(die_between_tensors, 1, sound, output, survived)
    (left,) = tmp_path.iterdir()
    assert (left / "model.safetensors").is_file(), "it died while it was writing"
    assert left.name.startswith(".out.tmp-"), "nothing takes it for a model"
    other = tmp_path / left.name.replace(".out.", ".other.")
    other.mkdir()
    export_checkpoint(sound, output)
    assert set(tmp_path.iterdir()) == {output, other}, "it removes its own left-overs alone"
    assert f"removing {left}" in caplog.text

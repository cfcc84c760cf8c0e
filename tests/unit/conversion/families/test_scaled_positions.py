"""Llama 3.1's rotary positions through import, training code, generator, export and back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from megatron_dattn.attention.rotary_scaling import RotaryScaling
from megatron_dattn.checkpoint import find_checkpoint, read_manifest
from megatron_dattn.checkpoint.manifest import MANIFEST_FILE, write_manifest
from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.conversion.hf_export.run import export_checkpoint
from megatron_dattn.conversion.hf_import.run import import_checkpoint, import_whole_model
from megatron_dattn.conversion.verify.exported import verify_export
from megatron_dattn.conversion.verify.imported import verify_checkpoint
from megatron_dattn.errors import CheckpointError
from megatron_dattn.inference import Prompt, generate_tokens, load_model
from megatron_dattn.inference.load import find_run
from megatron_dattn.runtime.distributed import destroy_distributed
from tests.support.run_folders import make_run_folder
from tests.unit.conversion.hf_models import save_language, save_vision

pytestmark = pytest.mark.usefixtures("own_modules")

# Of four pairs of channels one keeps its frequency, one part of it, and two are slowed down. The
# texts that are compared are longer than 32.
SCALING = RotaryScaling(
    factor=8.0, low_freq_factor=0.5, high_freq_factor=2.0, original_max_position_embeddings=32
)
ROPE = {"rope_type": "llama3", **vars(SCALING)}
TOLERANCE = 1e-4  # fp32 through another implementation, relative to the largest logit
PROMPT = "what is this? " * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("scaled")
    save_vision(base / "vision", varied=True)
    rope = {"rope_theta": 1000.0, **ROPE}
    save_language(base / "language", family="llama", varied=True, rope_parameters=rope)
    return base


@pytest.fixture(autouse=True)
def _no_groups_are_left():
    yield
    destroy_distributed()


def in_the_older_spelling(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("is_older", [False, True])
def test_an_import_computes_what_hugging_face_s_llama_does(tmp_path, is_older):
    save_vision(tmp_path / "vision")
    rope = {"rope_theta": 1000.0, **ROPE}
    save_language(tmp_path / "language", family="llama", varied=True, rope_parameters=rope)
    if is_older:
        in_the_older_spelling(tmp_path / "language")
    model = import_checkpoint(
        tmp_path / "vision", tmp_path / "language", tmp_path / "run", dtype="fp32"
    )
    assert model.language.rope_scaling == SCALING
    found = verify_checkpoint(tmp_path / "run")  # 64 random tokens
    assert max(comparison.largest for comparison in found) < TOLERANCE


@pytest.mark.parametrize(
    ("preset", "adapter"), [("dattn", {}), ("dattn_biased", {}), ("s_attn", {"norm": "none"})]
)
def test_an_export_computes_and_answers_alike_and_comes_back(base, tmp_path, preset, adapter):
    run, out = tmp_path / "run", tmp_path / "hf"
    make_run_folder(base, run, preset, **adapter)
    export_checkpoint(run, out)
    text = json.loads((out / "config.json").read_text())["text_config"]
    assert ROPE.items() <= text["rope_parameters"].items()
    assert text["rope_scaling"] == ROPE, "for readers from before transformers 5"
    found = verify_export(run, out)  # texts of 48 tokens, with images
    assert max(comparison.largest for comparison in found) < TOLERANCE
    again = import_whole_model(out, tmp_path / "again", dtype="fp32")
    assert again.language == find_run(run)[1].model.language
    before, after = (open_tensors(find_checkpoint(f).path) for f in (run, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].load(), after[name].load()) for name in before)


def test_the_generator_goes_on_at_scaled_positions(base, tmp_path):
    make_run_folder(base, tmp_path / "run", "dattn")
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    loaded = load_model(tmp_path / "run")
    prompt = Prompt.from_question(loaded, PROMPT, [])
    assert len(prompt.tokens.input_ids) > SCALING.original_max_position_embeddings
    (answer,) = generate_tokens(loaded, [prompt], max_new_tokens=12)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    ids = torch.tensor([prompt.tokens.input_ids])
    theirs = model.generate(input_ids=ids, max_new_tokens=12)[0, ids.shape[1] :]
    assert theirs.tolist() == answer
    unscaled = replace(loaded.config.model.language, rope_scaling=None)
    assert (
        unscaled.rotary_tables(ids[0], "cpu")[1]
        .ne(loaded.config.model.language.rotary_tables(ids[0], "cpu")[1])
        .any()
    )


def test_an_export_of_a_scaling_that_its_code_lacks_is_refused(base, tmp_path):
    make_run_folder(base, tmp_path / "run", "dattn")
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}
    config["text_config"] |= {"rope_scaling": linear, "rope_parameters": linear}
    path.write_text(json.dumps(config))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    with pytest.raises(ValueError, match="'linear'; this code knows 'default', 'llama3'"):
        model(input_ids=torch.tensor([[1, 7]]))
    with pytest.raises(CheckpointError, match="rope_type 'linear'"):
        import_whole_model(tmp_path / "hf", tmp_path / "again")


def edit_run(run: Path, name: str, value: object) -> None:
    path = run / "config.yaml"
    content = yaml.safe_load(path.read_text())
    content["model"]["language"][name] = value
    path.write_text(yaml.safe_dump(content))


def forget_the_field(run: Path) -> None:
    """As a run was before models had `rope_scaling`."""
    path = run / "config.yaml"
    content = yaml.safe_load(path.read_text())
    del content["model"]["language"]["rope_scaling"]
    path.write_text(yaml.safe_dump(content))
    checkpoint = find_checkpoint(run).path
    manifest = read_manifest(checkpoint)
    del manifest.facts["model"]["language"]["rope_scaling"]
    (checkpoint / MANIFEST_FILE).unlink()
    write_manifest(checkpoint, manifest)


def test_a_run_from_before_the_field_still_loads(tmp_path):
    save_vision(tmp_path / "vision")
    save_language(tmp_path / "language", family="llama")
    make_run_folder(tmp_path, tmp_path / "run", "dattn")
    forget_the_field(tmp_path / "run")
    assert load_model(tmp_path / "run").config.model.language.rope_scaling is None
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    assert verify_export(tmp_path / "run", tmp_path / "hf")[0].largest < TOLERANCE
    (text,) = verify_checkpoint(tmp_path / "run", language=tmp_path / "language")
    assert text.largest < TOLERANCE
    edit_run(tmp_path / "run", "rope_scaling", dict(vars(SCALING)))
    with pytest.raises(CheckpointError, match=r"rope_scaling\.factor: this run has 8\.0, the chec"):
        find_run(tmp_path / "run")


def test_a_scaled_run_is_no_unscaled_one(base, tmp_path):
    make_run_folder(base, tmp_path / "run", "dattn")
    assert find_run(tmp_path / "run")[1].model.language.rope_scaling == SCALING
    edit_run(tmp_path / "run", "rope_scaling", None)
    with pytest.raises(CheckpointError, match=r"rope_scaling\.factor: this run has nothing, the c"):
        find_run(tmp_path / "run")

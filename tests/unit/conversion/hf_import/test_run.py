"""A converted checkpoint holds exactly the Hugging Face weights, and wrong input leaves nothing."""

import json
import logging
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megatron_dattn.checkpoint import find_checkpoint, load_checkpoint, read_manifest
from megatron_dattn.checkpoint.reader import read_metadata, stored_shapes
from megatron_dattn.config.cli import load_config
from megatron_dattn.conversion.families import mistral, siglip
from megatron_dattn.conversion.hf_import.plan import plan_import
from megatron_dattn.conversion.hf_import.run import import_checkpoint, write_import
from megatron_dattn.errors import CheckpointError, UserError
from megatron_dattn.models.build import build_model
from megatron_dattn.models.execution import ExecutionConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.runtime.distributed import (
    destroy_distributed,
    initialize_distributed,
    seed_everything,
)
from tests.support.distributed import RankError, run_distributed
from tests.unit.conversion.hf_models import save_language, save_vision


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("hf")
    save_vision(base / "vision")
    save_language(base / "language")
    return base / "vision", base / "language"


@pytest.fixture(scope="module")
def converted(folders, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "base"
    config = import_checkpoint(*folders, output, dtype="fp32")
    return output, config


def test_every_tensor_is_bitwise_the_original(folders, converted):
    output, config = converted
    initialize_distributed()
    try:
        seed_everything(1)
        execution = ExecutionConfig(precision="fp32")
        model = build_model(config, ParallelConfig(), execution)
        path = find_checkpoint(output).path
        loaded = load_checkpoint(
            path,
            {"model": model.sharded_state_dict()},
            modules=["vision_model", "language_model"],
        )["model"]
    finally:
        destroy_distributed()
    for folder, prefix, rules in (
        (folders[0], "vision_model", siglip.vision_rules(config.vision)),
        (folders[1], "language_model", mistral.language_rules(config.language)),
    ):
        originals = load_file(folder / "model.safetensors")
        for rule in rules:
            value = loaded[f"{prefix}.{rule.megatron}"]
            parts = rule.layout.split(value)
            for part, name in zip(parts, rule.sources, strict=True):
                assert torch.equal(part.reshape(originals[name].shape), originals[name]), name


def test_run_folder_is_self_contained(converted):
    output, _ = converted
    config = load_config(output / "config.yaml")
    assert config.model.language.rope_theta == 1000.0
    assert config.model.vision.num_hidden_layers == 3
    tokenizer = output / "tokenizer"
    assert config.data.tokenizer == str(tokenizer)
    assert (tokenizer / "preprocessor_config.json").is_file()
    assert "<image>" in (tokenizer / "tokenizer.json").read_text()
    manifest = read_manifest(find_checkpoint(output).path)
    assert manifest.facts["modules"] == ["vision_model", "language_model"]


def test_what_a_preset_adds_is_no_part_of_a_conversion(folders, tmp_path):
    import_checkpoint(*folders, tmp_path / "run", attention="dattn_tanh")
    stored = stored_shapes(read_metadata(find_checkpoint(tmp_path / "run").path))
    assert any(key.endswith("self_attention.linear_qkv.weight") for key in stored)
    assert not any("gate" in key for key in stored)


def test_output_is_never_overwritten(folders, converted):
    with pytest.raises(CheckpointError, match="not empty"):
        import_checkpoint(*folders, converted[0])


def edit_config(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")


def set_tensor(folder, name, value):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: value}, folder / "model.safetensors")


def index_all(folder, file):
    names = load_file(folder / file)
    index = {"weight_map": dict.fromkeys(names, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def add_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{number}>" for number in range(64)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v, m: edit_config(m, model_type="phi3"), "'phi3'; supported: gemma2, ll"),
        (lambda v, m: edit_config(v, model_type="siglip2"), "'siglip2'; supported: clip"),
        (lambda v, m: edit_config(m, attention_bias=True), "attention_bias True"),
        (lambda v, m: edit_config(m, hidden_size=None), "lacks hidden_size"),
        (lambda v, m: edit_config(v, patch_size=0), r"vision\.patch_size must be positive"),
        (lambda v, m: edit_config(m, vocab_size=80), r"expected \[80, 48\]"),
        (lambda v, m: drop_tensor(m), r"missing model.norm.weight \[48\]"),
        (lambda v, m: set_tensor(m, "x.y", torch.ones(2)), r"unexpected x\.y \[2\]"),
        (
            lambda v, m: set_tensor(m, "model.norm.weight", torch.ones(7)),
            r"model\.norm\.weight has shape \[7\], expected \[48\]",
        ),
        (
            lambda v, m: set_tensor(m, "model.norm.weight", torch.ones(48, dtype=torch.int8)),
            r"model\.norm\.weight as I8: quantized",
        ),
        (lambda v, m: truncate(m / "model.safetensors"), r"model\.safetensors is damaged"),
        (lambda v, m: add_token(m), r"language' has ids up to 100.* vocab_size is 64"),
        (lambda v, m: (m / "tokenizer.json").unlink(), r"no tokenizer\.json"),
        (
            lambda v, m: truncate(m / "tokenizer.json"),
            r"language/tokenizer\.json is not valid JSON",
        ),
        (lambda v, m: truncate(m / "tokenizer_config.json"), r"language/tokenizer_config\.json is"),
        (
            lambda v, m: (m / "tokenizer.json").write_text("{}"),
            r"language/tokenizer\.json holds no tokenizer: Model missing",
        ),
        (
            lambda v, m: (
                shutil.copyfile(m / "model.safetensors", m / "other.safetensors")
                and index_all(m, "other.safetensors")
            ),
            r"model\.safetensors and .*model\.safetensors\.index\.json are both there",
        ),
        (lambda v, m: (v / "preprocessor_config.json").unlink(), "preprocessor_config"),
        (
            lambda v, m: edit_config(v, "preprocessor_config.json", size={"height": 9, "width": 9}),
            r"resizes to .*image_size is 28",
        ),
        (lambda v, m: (v / "config.json").unlink(), r"config\.json is missing"),
        (lambda v, m: (v / "model.safetensors").write_bytes(b"x" * 20), "damaged"),
    ],
)
def test_wrong_input_is_one_error_and_leaves_nothing(folders, tmp_path, damage, message):
    vision, language = tmp_path / "vision", tmp_path / "language"
    shutil.copytree(folders[0], vision)
    shutil.copytree(folders[1], language)
    damage(vision, language)
    with pytest.raises(UserError, match=message):
        import_checkpoint(vision, language, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_a_tied_head_that_is_stored_again_must_be_the_embedding(folders, tmp_path, family):
    language = tmp_path / "language"
    save_language(language, family=family, tie_word_embeddings=True)
    embedding = load_file(language / "model.safetensors")["model.embed_tokens.weight"]
    for number, (head, message) in enumerate(
        [
            (embedding.clone(), None),
            (embedding + torch.eye(*embedding.shape)[[*range(1, 64), 0]], "different values"),
            (embedding[:-1].clone(), "different values"),
            (embedding.to(torch.float16), "different values"),
        ]
    ):
        set_tensor(language, "lm_head.weight", head)
        output = tmp_path / f"out-{number}"
        if message is None:
            config = import_checkpoint(folders[0], language, output)
            assert config.language.tie_word_embeddings
            continue
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(folders[0], language, output)
        assert not output.exists()


def test_a_full_disk_is_found_before_anything_is_written(folders, tmp_path, monkeypatch):
    needed = plan_import(*folders, tmp_path / "out").num_bytes
    usage = shutil.disk_usage(tmp_path)
    for free, enough in ((needed - 1, False), (needed + 10**6, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if enough:
            import_checkpoint(*folders, tmp_path / "out")
            continue
        with pytest.raises(CheckpointError, match=r"disk full: the checkpoint needs 0\.00 GiB"):
            import_checkpoint(*folders, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    stored = sum(file.stat().st_size for file in find_checkpoint(tmp_path / "out").path.iterdir())
    assert needed < stored < needed + 10**6


def test_a_disk_that_fills_up_leaves_nothing(folders, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    output = tmp_path / "out"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(CheckpointError) as caught:
            import_checkpoint(*folders, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert f"File too large: '{output}/" in message
    assert "no file of more than 100,000 bytes: raise ulimit -f" in message
    for misleading in (".tmp-", "previous checkpoint", "free now", "\n"):
        assert misleading not in message
    assert not list(tmp_path.iterdir())


def test_errors_and_log_have_the_folder_s_final_name(folders, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    plan = plan_import(*folders, tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(CheckpointError, match=rf"disk full: .*, {tmp_path}/out has 0\.000 GiB"):
            write_import(plan)
    write_import(plan)
    assert f"imported to {tmp_path / 'out'}" in caplog.messages
    assert ".tmp-" not in "".join(r.message for r in caplog.records if r.levelno >= logging.INFO)


def die_between_tensors(vision: Path, language: Path, output: Path, survived: int) -> None:
    count = 0

    def kill(num_bytes: int) -> None:
        nonlocal count
        count += 1
        if count > survived:
            os.kill(os.getpid(), signal.SIGKILL)

    write_import(plan_import(vision, language, output), kill)


@pytest.mark.parametrize("survived", [0, 17])
def test_a_killed_import_leaves_no_run_folder_and_the_next_one_clears_up(
    folders, tmp_path, survived, caplog
):
    output = tmp_path / "out"
    with pytest.raises(RankError, match="died"):
        run_distributed(die_between_tensors, 1, *folders, output, survived)
    (left,) = tmp_path.iterdir()
    assert list(left.glob("step-*/__0_0.distcp")), "it died while it was writing"
    assert left.name.startswith(".out.tmp-"), "nothing takes it for a run folder"
    assert find_checkpoint(output) is None
    other = tmp_path / left.name.replace(".out.", ".other.")
    other.mkdir()
    import_checkpoint(*folders, output)
    assert find_checkpoint(output).step == 0
    assert set(tmp_path.iterdir()) == {output, other}, "it removes its own left-overs alone"
    assert f"removing {left}" in caplog.text


def test_an_output_that_was_taken_since_the_plan_is_left_alone(folders, tmp_path):
    plan = plan_import(*folders, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("theirs")
    with pytest.raises(CheckpointError, match="not empty"):
        write_import(plan)
    assert (tmp_path / "out" / "theirs").read_text() == "theirs"


def test_an_output_that_is_taken_meanwhile_is_left_alone(folders, tmp_path):
    plan = plan_import(*folders, tmp_path / "out")

    def take(num_bytes: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").write_text("theirs")

    with pytest.raises(CheckpointError, match=r"out cannot be written"):
        write_import(plan, take)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_a_folder_that_cannot_be_written_is_one_error(folders, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"out cannot be written: .*file"):
        import_checkpoint(*folders, tmp_path / "file" / "out")


def test_a_run_folder_remembers_where_it_came_from_and_names_its_own_files(
    folders, tmp_path, monkeypatch
):
    monkeypatch.chdir(folders[0].parent)
    output = Path(os.path.relpath(tmp_path / "out"))
    import_checkpoint(Path("vision"), Path("language"), output)
    monkeypatch.chdir(tmp_path)
    manifest = find_checkpoint(tmp_path / "out").manifest
    assert manifest.facts["sources"] == {
        "vision_model": str(folders[0].resolve()),
        "language_model": str(folders[1].resolve()),
    }
    (tmp_path / "out").rename(tmp_path / "moved")
    config = load_config(tmp_path / "moved" / "config.yaml")
    assert config.data.tokenizer == str(tmp_path / "moved" / "tokenizer")

"""Exports of checkpoints of every layout are the same files, byte by byte."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from megatron.core import parallel_state

from megatron_dattn.checkpoint import save_checkpoint
from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.conversion.hf_export.run import export_checkpoint, plan_tensors
from megatron_dattn.conversion.hf_import.run import import_checkpoint
from megatron_dattn.conversion.io.safetensors_reader import SafetensorsFolder
from megatron_dattn.conversion.io.safetensors_writer import write_shards
from megatron_dattn.models.config import AdapterConfig, ModelConfig
from megatron_dattn.parallel.config import ParallelConfig
from tests.support.distributed import run_distributed
from tests.support.megatron import init_model_parallel
from tests.support.vlm import CLIP, tiny_model, tiny_model_config
from tests.unit.conversion.hf_models import save_language, save_vision

FACTS = {"modules": ["vision_model", "adapter", "language_model"], "stage": "stage1"}
LAYOUTS = {"TP2": (2, 1), "PP2": (1, 2), "TP2-PP2": (2, 2)}
# Vocabularies that are padded in training, tied and untied heads, whatever a preset adds.
MODELS = {
    "gemma2": tiny_model_config(family="gemma2", tie_word_embeddings=True),
    "gates": tiny_model_config("dattn_tanh", vision=CLIP, family="llama", vocab_size=65),
    "cascade": tiny_model_config("dattn_cascade", family="gemma2"),
    "saisa": tiny_model_config("saisa", vision=CLIP, tie_word_embeddings=True, vocab_size=65),
    "qwen2": tiny_model_config(family="qwen2", tie_word_embeddings=True),
    "qwen3": replace(
        tiny_model_config("s_attn", family="qwen3", vocab_size=65),
        adapter=AdapterConfig(norm="none"),
    ),
    "llava": replace(
        tiny_model_config("s_attn", vision=CLIP, family="llama", tie_word_embeddings=True),
        adapter=AdapterConfig(norm="none"),
    ),
}


def save_models(
    folder: str, models: dict[str, ModelConfig], tensor: int, pipeline: int, facts: dict[str, Any]
) -> None:
    """One checkpoint per model, of weights that are the same under every layout."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    parallel_state.destroy_model_parallel()
    init_model_parallel(tensor, pipeline)
    for name, config in models.items():
        state = {"model": tiny_model(config, parallel=parallel).sharded_state_dict()}
        save_checkpoint(Path(folder) / name, 1, state, facts=facts | {"model": asdict(config)})


def exported_files(folder: Path, layout: tuple[int, int]) -> dict[str, bytes]:
    """The weights that are written for every model."""
    tensor, pipeline = layout
    run_distributed(save_models, tensor * pipeline, str(folder), MODELS, tensor, pipeline, FACTS)
    files = {}
    for name, config in MODELS.items():
        output = folder / f"hf-{name}"
        output.mkdir()
        stored = open_tensors(folder / name / "step-0000001")
        write_shards(output, plan_tensors(stored, config), 10**9)
        shapes = SafetensorsFolder(output).shapes
        vocabulary = config.language.vocab_size
        assert shapes["model.language_model.embed_tokens.weight"][0] == vocabulary
        assert ("lm_head.weight" in shapes) != config.language.tie_word_embeddings
        files[name] = (output / "model.safetensors").read_bytes()
    return files


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return exported_files(tmp_path_factory.mktemp("whole"), (1, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_do_not_depend_on_the_layout(
    tmp_path: Path, of_one_process: dict[str, bytes], layout: str
) -> None:
    for name, content in exported_files(tmp_path, LAYOUTS[layout]).items():
        assert content == of_one_process[name], name


# What is exported whole: with code of ours, and as a stock LLaVA; 67 tokens are padded in training.
WHOLE = {"dattn": ("dattn_tanh", {}), "llava": ("s_attn", {"norm": "none"})}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, ModelConfig]]:
    """Run folders that lack a checkpoint with an adapter, and the models of theirs."""
    base = tmp_path_factory.mktemp("imported")
    save_vision(base / "vision", family="clip")
    save_language(base / "language", family="llama", vocab_size=67)
    runs = {}
    for name, (preset, adapter) in WHOLE.items():
        folder = base / name
        config = import_checkpoint(
            base / "vision", base / "language", folder, attention=preset, dtype="fp32"
        )
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        settings["model"]["adapter"] |= adapter
        settings["data"]["template"] = "mistral_v3"
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        runs[name] = folder, replace(config, adapter=replace(config.adapter, **adapter))
    return runs


def whole_exports(
    imported: dict[str, tuple[Path, ModelConfig]], folder: Path, layout: tuple[int, int]
) -> dict[str, bytes]:
    """Every file of every export, by name."""
    tensor, pipeline = layout
    for name, (run, _) in imported.items():
        (folder / name).mkdir()
        shutil.copyfile(run / "config.yaml", folder / name / "config.yaml")
        shutil.copytree(run / "tokenizer", folder / name / "tokenizer")
    models = {name: config for name, (_, config) in imported.items()}
    arguments = (str(folder), models, tensor, pipeline, FACTS)
    run_distributed(save_models, tensor * pipeline, *arguments)
    files = {}
    for name in imported:
        export_checkpoint(folder / name, folder / f"hf-{name}")
        for path in sorted((folder / f"hf-{name}").iterdir()):
            files[f"{name}/{path.name}"] = path.read_bytes()
    return files


@pytest.fixture(scope="module")
def whole_of_one_process(
    imported: dict[str, tuple[Path, ModelConfig]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    return whole_exports(imported, tmp_path_factory.mktemp("one"), (1, 1))


@pytest.mark.parametrize("layout", ["TP2", "PP2"])
def test_whole_folders_do_not_depend_on_the_layout(
    imported: dict[str, tuple[Path, ModelConfig]],
    tmp_path: Path,
    whole_of_one_process: dict[str, bytes],
    layout: str,
) -> None:
    files = whole_exports(imported, tmp_path, LAYOUTS[layout])
    assert files.keys() == whole_of_one_process.keys()
    for name, content in files.items():
        assert content == whole_of_one_process[name], name
    for name in ("README.md", "config.json", "model.safetensors", "tokenizer.json"):
        assert {f"dattn/{name}", f"llava/{name}"} <= files.keys()
    assert "dattn/modeling_dattn.py" in files

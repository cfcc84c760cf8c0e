"""Exports of checkpoints of every layout are the same files, byte by byte."""

from dataclasses import replace
from pathlib import Path

import pytest
from megatron.core import parallel_state

from megatron_dattn.checkpoint import save_checkpoint
from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.conversion.export_hf import plan_tensors
from megatron_dattn.conversion.safetensors_reader import SafetensorsFolder
from megatron_dattn.conversion.safetensors_writer import write_shards
from megatron_dattn.models.config import AdapterConfig
from megatron_dattn.parallel.config import ParallelConfig
from tests.support.distributed import run_distributed
from tests.support.megatron import init_model_parallel
from tests.support.vlm import CLIP, tiny_model, tiny_model_config

FACTS = {"modules": ["vision_model", "adapter", "language_model"], "stage": "stage1"}
LAYOUTS = {"TP2": (2, 1), "PP2": (1, 2), "TP2-PP2": (2, 2)}
# Vocabularies that are padded in training, tied and untied heads, whatever a preset adds.
MODELS = {
    "gemma2": tiny_model_config(family="gemma2", tie_word_embeddings=True),
    "gates": tiny_model_config("dattn_tanh", vision=CLIP, family="llama", vocab_size=65),
    "cascade": tiny_model_config("dattn_cascade", family="gemma2"),
    "saisa": tiny_model_config("saisa", vision=CLIP, tie_word_embeddings=True, vocab_size=65),
    "llava": replace(
        tiny_model_config("s_attn", vision=CLIP, family="llama", tie_word_embeddings=True),
        adapter=AdapterConfig(input_norm=False),
    ),
}


def save_models(folder: str, tensor: int, pipeline: int) -> None:
    """One checkpoint per model, of weights that are the same under every layout."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    parallel_state.destroy_model_parallel()
    init_model_parallel(tensor, pipeline)
    for name, config in MODELS.items():
        state = {"model": tiny_model(config, parallel=parallel).sharded_state_dict()}
        save_checkpoint(Path(folder) / name, 1, state, facts=FACTS)


def exported_files(folder: Path, layout: tuple[int, int]) -> dict[str, bytes]:
    """The weights that are written for every model."""
    tensor, pipeline = layout
    run_distributed(save_models, tensor * pipeline, str(folder), tensor, pipeline)
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

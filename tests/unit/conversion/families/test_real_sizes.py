"""Published models at their real sizes: headers alone are read, and the values are holes in files.

Names and shapes are those of transformers' own classes, so they do not come from our rules.
"""

import json
import os
import shutil
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.unit.conversion.hf_models import save_language, save_vision
from tools.convert_checkpoint import main

# The fields of the published config.json that differ from transformers' defaults, and a few more.
SIGLIP_SO400M = SiglipVisionConfig(
    hidden_size=1152,
    image_size=384,
    intermediate_size=4304,
    num_attention_heads=16,
    num_hidden_layers=27,
    patch_size=14,
)
MISTRAL_7B_V03 = MistralConfig(
    vocab_size=32768,
    head_dim=128,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_theta": 1_000_000.0, "rope_type": "default"},
    sliding_window=None,
    tie_word_embeddings=False,
)
GEMMA2_9B = Gemma2Config(
    hidden_size=3584,
    intermediate_size=14336,
    num_attention_heads=16,
    num_hidden_layers=42,
    num_key_value_heads=8,
)
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
QWEN25_05B = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
QWEN3_06B = Qwen3Config(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)


def write_sparse(folder: Path, kind: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Put weights of a model's real size into its folder, in two shards that take no room."""
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = kind(config).state_dict()
    if getattr(config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    (folder / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for file, part in (("one.safetensors", names[::2]), ("two.safetensors", names[1::2])):
        header, end = {}, 0
        for name in part:
            shape = list(tensors[name].shape)
            start, end = end, end + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + end)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "siglip"
    save_vision(folder)  # for its image processor
    processor = folder / "preprocessor_config.json"
    size = {"height": 384, "width": 384}
    processor.write_text(json.dumps(json.loads(processor.read_text()) | {"size": size}))
    write_sparse(folder, SiglipVisionModel, SIGLIP_SO400M)
    return folder


@pytest.mark.parametrize(
    ("kind", "config", "parameters", "size"),
    [
        # The sizes on their pages; SigLIP adds 397,745,440 without its last layer and its head.
        (MistralForCausalLM, MISTRAL_7B_V03, "7,248,023,552", "15.29 GB"),
        (Gemma2ForCausalLM, GEMMA2_9B, "9,241,705,984", "19.28 GB"),
        (LlamaForCausalLM, SMOLLM2_135M, "134,515,008", "1.06 GB"),
        (Qwen2ForCausalLM, QWEN25_05B, "494,032,768", "1.78 GB"),
        (Qwen3ForCausalLM, QWEN3_06B, "596,049,920", "1.99 GB"),
    ],
    ids=["mistral-7b-v0.3", "gemma-2-9b", "smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b"],
)
def test_inspect_and_dry_run(vision, tmp_path, monkeypatch, capsys, kind, config, parameters, size):
    language = tmp_path / "language"
    save_language(language)  # for its tokenizer
    write_sparse(language, kind, config)
    assert main(["inspect", str(language)]) == 0
    assert f"{parameters} parameters" in capsys.readouterr().out
    usage = shutil.disk_usage(tmp_path)
    inputs = ["--vision", str(vision), "--language", str(language), "--dry-run"]
    command = ["import", *inputs, "--output", str(tmp_path / "out")]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * 10**10))
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"language_model: {parameters} parameters" in said
    assert "vision_model: 397,745,440 parameters" in said
    assert f"{size} as bf16" in said
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    assert main(command) == 2
    assert "disk full: the checkpoint needs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

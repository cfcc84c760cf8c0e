"""What is no Hugging Face model is named in one short line with the way out, by every option."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_dattn.conversion.io.hf_folder import read_model_config
from megatron_dattn.conversion.io.safetensors_reader import SafetensorsFolder
from megatron_dattn.errors import CheckpointError
from tools.convert_checkpoint import main

# Files (text, or JSON) of a folder without a model's safetensors, and what is said about them.
FOLDERS: list[tuple[dict[str, Any], str]] = [
    (
        {"adapter_config.json": {"base_model_name_or_path": "a/base"}, "adapter_model.bin": ""},
        "holds adapter_config.json, adapter_model.bin, which is a PEFT adapter for a/base, not a "
        "model; merge it first",
    ),
    ({"adapter_model.safetensors": ""}, "which is a PEFT adapter, not a model; merge it first"),
    ({"mm_projector.bin": ""}, "which is a part of a model in LLaVA's own format"),
    ({"latest.json": "", "config.yaml": ""}, "which is a run of this program, .* export it first"),
    ({"step-0000001/manifest.json": ""}, "which is a run of this program"),
    ({"llama-Q4_K_M.gguf": ""}, "which is llama.cpp's format; name the file"),
    ({"zero_to_fp32.py": "", "global_step5/x_optim_states.pt": ""}, "join the shards first"),
    ({"pytorch_model_fsdp_0/__0_0.distcp": ""}, "shards of torch's distributed checkpoints"),
    ({"__0_0.distcp": "", ".metadata": ""}, "join them first"),
    ({"checkpoint-500/config.json": {}}, "folder of a training run: name one of its checkpoints"),
    ({"open_clip_config.json": {}, "open_clip_pytorch_model.bin": ""}, "which is OpenCLIP's"),
    ({"consolidated.safetensors": "", "params.json": {}}, "which is Mistral's own format"),
    ({"consolidated.00.pth": "", "params.json": {}}, "which is Meta's or Mistral's own format"),
    ({"pytorch_model-00001-of-00002.bin": "", "training_args.bin": ""}, "safetensors only"),
    ({"optimizer.pt": "", "trainer_state.json": {}}, "state of a training run; .* not there"),
    ({"model.ckpt": ""}, "read from safetensors only"),
]
CONFIGS: list[tuple[dict[str, Any], str]] = [
    (
        {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "architectures": ["LlavaLlama"]},
        r"LLaVA's own format \(LlavaLlama, mm_projector\.\*\)",
    ),
    ({"model_type": "llava_mistral", "mm_vision_tower": "x"}, r"own format \(llava_mistral, "),
    *(
        (
            {"model_type": "mistral", "quantization_config": {"quant_method": method}},
            rf"quantized model \(quantization_config: {method}\).* BF16 or FP32",
        )
        for method in ("gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors")
    ),
    ({"model_type": "llama", "compression_config": {"format": "x"}}, "holds a quantized model"),
    ({"model_type": "llama", "quantization": {"bits": 4}}, "holds a quantized model"),
    (
        {"model_type": "llava", "text_config": {"quantization_config": {"quant_method": "awq"}}},
        r"quantized model \(quantization_config: awq\)",
    ),
    *(
        (
            {"model_type": "mistral", name: value},
            r"asks for code from the hub \(\w+: .*remove that field",
        )
        for name, value in (
            ("attn_implementation", "someone/kernel"),
            ("_attn_implementation", "someone/kernel@main:attention"),
            ("_attn_implementation_internal", "someone/kernel"),
            ("attn_implementation", {"text_config": "sdpa", "vision_config": "someone/kernel"}),
            ("_experts_implementation", "someone/kernel"),
            ("use_kernels", True),
            ("kernel_config", {"RMSNorm": "someone/kernel:RMSNorm"}),
            ("vision_config", {"attn_implementation": "someone/kernel"}),
        )
    ),
    *(
        (
            {"model_type": kind, "auto_map": {"AutoModelForCausalLM": code}},
            "brings code of its own .*not run here",
        )
        for kind in ("mistral", "siglip_vision_model", "dattn")
        for code in ("evil.Model", "someone/repository--evil.Model")
    ),
]


def fill(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def check(error: CheckpointError, folder: Path) -> None:
    text = str(error).replace(str(folder), "FOLDER")
    assert "\n" not in text
    assert len(text) < 300
    assert "FOLDER" in text


@pytest.mark.parametrize(("files", "message"), FOLDERS)
def test_files_of_other_programs_are_named_with_and_without_a_config(tmp_path, files, message):
    fill(tmp_path, files)
    with pytest.raises(CheckpointError, match=message) as without:
        read_model_config(tmp_path)
    check(without.value, tmp_path)
    fill(tmp_path, {"config.json": {"model_type": "mistral"}})
    assert read_model_config(tmp_path) == {"model_type": "mistral"}
    with pytest.raises(CheckpointError, match=message) as weightless:
        SafetensorsFolder(tmp_path)
    check(weightless.value, tmp_path)


@pytest.mark.parametrize(("config", "message"), CONFIGS)
def test_a_config_that_no_weights_can_save(tmp_path, config, message):
    fill(tmp_path, {"config.json": config})
    with pytest.raises(CheckpointError, match=message) as error:
        read_model_config(tmp_path)
    check(error.value, tmp_path)


def test_a_config_may_name_what_transformers_has_itself(tmp_path):
    config = {"model_type": "mistral", "attn_implementation": "flash_attention_2", "auto_map": {}}
    config |= {"dtype": "float99", "quantization_config": None, "use_kernels": False}
    fill(tmp_path, {"config.json": config})
    assert read_model_config(tmp_path) == config


def test_what_is_no_folder_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.gguf").write_text("")
    for name, message in (
        ("empty", "empty is empty"),
        ("model.gguf", "is a file: name the folder"),
        ("mistralai/Mistral-7B-v0.3", r"hf download mistralai/Mistral-7B-v0\.3 --local-dir"),
        ("/nothing/here", "there is no folder /nothing/here$"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_model_config(Path(name))


def test_a_sound_folder_beside_other_files_is_read(tmp_path):
    """As the Trainer leaves it, or a hub repository with several formats."""
    others = {"optimizer.pt": "", "consolidated.safetensors": "", "pytorch_model.bin": ""}
    fill(tmp_path, {"config.json": {"model_type": "mistral"}, **others})
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert read_model_config(tmp_path)["model_type"] == "mistral"
    assert SafetensorsFolder(tmp_path).shapes == {"x": (1,)}


def test_a_git_lfs_pointer_is_not_called_damaged(tmp_path):
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    )
    with pytest.raises(CheckpointError, match=r"is a Git LFS pointer, .* git lfs pull"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("option", ["--language", "--vision", "--model"])
def test_every_option_says_so(tmp_path, option, capsys):
    adapter = fill(tmp_path / "adapter", {"adapter_config.json": {}})
    words = [option, str(adapter)]
    if option != "--model":
        other = fill(tmp_path / "other", {"config.json": {"model_type": "mistral"}})
        words += ["--vision" if option == "--language" else "--language", str(other)]
    assert main(["import", *words, "--output", str(tmp_path / "out")]) == 2
    assert "which is a PEFT adapter" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("vision", "language", "message"),
    [
        ("mistral", "siglip", "vision encoder is of type 'mistral'; .*; give it with --language"),
        ("siglip", "clip", "language model is of type 'clip'; .*; give it with --vision"),
        ("siglip", "dattn", "is of type 'dattn'; .*; it is a whole model: give it with --model"),
    ],
)
def test_folders_in_each_other_s_place(tmp_path, vision, language, message, capsys):
    for name, kind in (("vision", vision), ("language", language)):
        fill(tmp_path / name, {"config.json": {"model_type": kind}})
    words = ["--vision", str(tmp_path / "vision"), "--language", str(tmp_path / "language")]
    assert main(["import", *words, "--output", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])

"""Folders that look like a Hugging Face model and are not one that can be imported.

Each is recognised by the files or the config.json that its program writes, and named in one line
with the way to a folder of safetensors that an import reads.
"""

import re
from pathlib import Path
from typing import Any

from megatron_dattn.conversion.io.foreign_code import refuse_code_and_quantization
from megatron_dattn.conversion.io.json_files import read_json
from megatron_dattn.errors import CheckpointError

CONFIG_FILE = "config.json"
_PICKLED = (
    "but weights are read from safetensors only; load and save the model again with transformers "
    "(save_pretrained)"
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What a folder without a model's safetensors is, by files that it holds; the first that fits.
_KINDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("adapter_config.json", "adapter_model.*"),
        "which is a PEFT adapter{base}, not a model; merge it first (PeftModel.from_pretrained("
        "base, adapter).merge_and_unload(), then save_pretrained) and import the result",
    ),
    (
        ("mm_projector.bin", "non_lora_trainables.bin"),
        "which is a part of a model in LLaVA's own format; merge it with LLaVA's scripts first",
    ),
    (
        ("latest.json", "step-*/manifest.json", "manifest.json"),
        "which is a run of this program, not a Hugging Face folder: name it to "
        "--checkpoint.load, or export it first",
    ),
    (
        ("*.gguf",),
        "which is llama.cpp's format; download the model that it was made from, in safetensors",
    ),
    (
        ("zero_to_fp32.py", "global_step*", "*_optim_states.pt"),
        "which is DeepSpeed's: join the shards first (python zero_to_fp32.py . joined/ "
        "--safe_serialization)",
    ),
    (
        ("*.distcp", "pytorch_model_fsdp*"),
        "which are shards of torch's distributed checkpoints; join them first (accelerate "
        "merge-weights)",
    ),
    (
        ("checkpoint-*/config.json",),
        "which is the folder of a training run: name one of its checkpoints",
    ),
    (
        ("open_clip_*",),
        "which is OpenCLIP's format; download the encoder in Hugging Face's",
    ),
    (
        ("consolidated*.safetensors",),
        "which is Mistral's own format; download the Hugging Face shards (model-*.safetensors and "
        "model.safetensors.index.json)",
    ),
    (
        ("consolidated*.pth", "params.json"),
        "which is Meta's or Mistral's own format; download the model in Hugging Face's",
    ),
    (("pytorch_model*.bin", "model*.bin"), _PICKLED),
    (
        ("optimizer.*", "trainer_state.json", "rng_state*.pth"),
        "which is the state of a training run; the model's weights are not there",
    ),
    (("*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack"), _PICKLED),
)


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face model.

    Raises:
        CheckpointError: there is none, or it is that of a model which cannot be imported whatever
            its weights are: a quantized one, one in LLaVA's own format, one that comes with code.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            _not_a_folder(folder)
            or what_it_holds(folder)
            or f"{folder / CONFIG_FILE} is missing: is this a Hugging Face folder?"
        )
    config = read_json(folder / CONFIG_FILE)
    if "mm_projector_type" in config or "mm_vision_tower" in config:
        raise CheckpointError(
            f"{folder} is in LLaVA's own format ({_architecture(config)}, mm_projector.*), which "
            "transformers does not read either; import its conversion with --model, for instance "
            "llava-hf/llava-1.5-7b-hf for liuhaotian/llava-v1.5-7b"
        )
    refuse_code_and_quantization(folder, config)
    return config


def what_it_holds(folder: Path) -> str | None:
    """One line about a folder of another program's files; None if nothing is recognised."""
    if folder.is_dir() and not any(folder.iterdir()):
        return f"{folder} is empty"
    for patterns, text in _KINDS:
        found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
        if found:
            names = some([str(path.relative_to(folder)) for path in found])
            return f"{folder} holds {names}, {text.format(base=_base_model(folder))}"
    return None


def some(names: list[str], shown: int = 3) -> str:
    """The first names and how many more there are: messages stay short."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def _not_a_folder(folder: Path) -> str | None:
    if folder.is_file():
        return f"{folder} is a file: name the folder of the model, with {CONFIG_FILE} in it"
    if folder.exists():
        return None
    if _HUB_ID.fullmatch(str(folder)):
        return (
            f"there is no folder {folder}; if it is a model on the Hugging Face hub, download it "
            f"first (hf download {folder} --local-dir FOLDER) and name that folder"
        )
    return f"there is no folder {folder}"


def _base_model(folder: Path) -> str:
    """Which model an adapter belongs to, if it says so."""
    path = folder / "adapter_config.json"
    name = read_json(path).get("base_model_name_or_path") if path.is_file() else None
    return f" for {name!s:.100}" if name else ""


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0] if isinstance(named, list) and named else config.get("model_type"))[:60]

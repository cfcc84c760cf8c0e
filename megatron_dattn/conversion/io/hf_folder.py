"""Reads a Hugging Face folder's config.json, or says why the folder cannot be imported.

Folders of other programs are recognised by the files or the config.json that these write, and named
in one line with the way to a folder of safetensors that an import reads.

Code that a config asks for is refused, not run: a model's own Python files (`auto_map`) and compute
kernels from the hub (an attention implementation called `someone/kernel`). transformers loads the
second without being asked to trust it, wherever the package `kernels` is installed. Neither is
needed to read weights, and a model that computes by such code may be another than its type says.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dattn.errors import CheckpointError, UserError, quoted
from megatron_dattn.runtime.untrusted_file import JsonFields, read_json_object

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
        "which is llama.cpp's format; name the file itself: --language MODEL.gguf",
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


AUTO_MAP = {
    "AutoConfig": "configuration_dattn.DAttnConfig",
    "AutoModel": "modeling_dattn.DAttnModel",
    "AutoModelForImageTextToText": "modeling_dattn.DAttnForConditionalGeneration",
    "AutoProcessor": "processing_dattn.DAttnProcessor",
}
"""The code that our own exports bring."""

_IMPLEMENTATIONS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
)
_KERNELS = ("use_kernels", "kernel_config")
_QUANTIZED = ("quantization_config", "compression_config", "quantization")


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CheckpointError: the file is missing, is no plain file, or is not a JSON object.
    """
    try:
        return read_json_object(path, CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: is this a Hugging Face folder?") from None


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


def refuse_code_and_quantization(folder: Path, config: dict[str, Any]) -> None:
    """Look through a config and the configs in it.

    Raises:
        CheckpointError: naming the field and what to do.
    """
    for name, value in _fields(config):
        if not value:
            continue
        if name in _QUANTIZED:
            raise CheckpointError(
                f"{folder} holds a quantized model ({name}: {_method(value)}); quantized weights "
                "cannot be trained: import the BF16 or FP32 model that it was made from"
            )
        if name in _KERNELS or (name in _IMPLEMENTATIONS and "/" in str(value)):
            raise CheckpointError(
                f"{folder}/config.json asks for code from the hub ({name}: {quoted(value)}), which "
                "is not run here; remove that field: weights do not depend on it"
            )
        if name == "auto_map" and value != AUTO_MAP:
            raise CheckpointError(
                f"{folder}/config.json brings code of its own (auto_map: {quoted(value)}), which "
                "is not run here and may compute otherwise than its model_type says; if "
                "transformers' own class reads the model, save it again with that"
            )


def _fields(config: object) -> Iterator[tuple[str, Any]]:
    """Names and values at every depth."""
    if isinstance(config, list):
        for value in config:
            yield from _fields(value)
    if isinstance(config, dict):
        for name, value in config.items():
            yield name, value
            yield from _fields(value)


def _method(value: object) -> str:
    method = value.get("quant_method") if isinstance(value, dict) else None
    return f"{method!s:.40}"


@dataclass(frozen=True)
class ConfigValues(JsonFields):
    """A config.json, or a section of one; all methods raise CheckpointError."""

    where: str = "config.json"
    error: type[UserError] = CheckpointError

    def whole_or_none(self, name: str) -> int | None:
        """None where it is null or missing."""
        return None if self.values.get(name) is None else self.whole(name)

    def number_or_none(self, name: str) -> float | None:
        """None where it is null or missing."""
        return None if self.values.get(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """True or false; false where it is null or missing."""
        return False if self.values.get(name) is None else super().flag(name)

    def section_or_none(self, name: str) -> dict[str, Any] | None:
        """None where it is null or missing."""
        return None if self.values.get(name) is None else self.section(name)

    def check_present(self, names: tuple[str, ...]) -> None:
        """Raise CheckpointError, with all their names, if some are null or missing."""
        missing = [name for name in names if self.values.get(name) is None]
        if missing:
            raise self.error(f"{self.where} lacks {', '.join(missing)}")

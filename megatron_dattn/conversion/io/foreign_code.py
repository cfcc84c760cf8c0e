"""What a Hugging Face config can ask for that would run somebody's code: refused, not run.

A model's own Python files (`auto_map`) and compute kernels from the hub (an attention
implementation called `someone/kernel`) are code of whoever wrote the config. transformers loads the
second without being asked to trust it, wherever the package `kernels` is installed. Neither is
needed to read weights, and a model that computes by such code may be another than its type says.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dattn.errors import CheckpointError, quoted

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

"""GGUF files, llama.cpp's, as Hugging Face folders for as long as somebody reads them.

transformers reads the file: it undoes quantization and llama.cpp's order of channels. It passes
over what it does not know, and draws at random what it does not find; here both are errors. The
weights are written in float32, every digit of what the file says.
"""

import importlib.util
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dattn.conversion.io.hf_folder import some
from megatron_dattn.errors import CheckpointError, UserError

_PACKAGES = ("gguf", "accelerate")  # the second, because transformers asks for it
# llama.cpp calls Mistral's models Llama, whose layers they have.
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2")
_HEAD = "lm_head.weight"
_TENSORS = re.compile(
    r"(token_embd|output|output_norm|blk\.\d+\.(attn_norm|attn_[qkv]|attn_output|attn_[qk]_norm"
    r"|post_attention_norm|ffn_norm|ffn_(gate|up|down)|post_ffw_norm))\.weight"
    r"|blk\.\d+\.attn_[qkv]\.bias"
)


def has_gguf() -> bool:
    """True if the packages are installed that GGUF files are read with."""
    return all(importlib.util.find_spec(name) is not None for name in _PACKAGES)


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """A folder of the language model in a GGUF file: config, weights, tokenizer, chat template.

    It is a temporary one, gone afterwards; errors that name it name the file instead.

    Raises:
        CheckpointError: a package or the file is missing, it is damaged, or it holds a model that
            transformers does not read whole.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    if not has_gguf():
        raise CheckpointError(
            f"{path}: reading GGUF files needs the packages {' and '.join(_PACKAGES)}; "
            "pip install 'megatron_dattn[gguf]'"
        )
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / path.stem  # which messages may name
        try:
            _unpack(path, folder)
            yield folder
        except UserError as error:
            raise type(error)(str(error).replace(str(folder), str(path))) from error


def _unpack(path: Path, folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        fields = _fields(path)
        config = AutoConfig.from_pretrained(path.parent, **source)
        _correct(config, fields)
        config.save_pretrained(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, **source, config=config, dtype="float32", output_loading_info=True
        )
        AutoTokenizer.from_pretrained(path.parent, **source).save_pretrained(folder)
    except UserError:
        raise
    except Exception as error:  # of a damaged file anything may come
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read by transformers: {reason}") from error
    model, report = loaded
    weights = dict(model.state_dict())
    if config.tie_word_embeddings:
        del weights[_HEAD]
    missing = sorted(weights.keys() & set(report["missing_keys"]))
    if missing:
        raise CheckpointError(f"{path} lacks {some(missing)}")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # Else transformers would build the tokenizer anew by the rules of the model's class.
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8"))
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _fields(path: Path) -> dict[str, Any]:
    """What the file says of its architecture, by names without it.

    Raises:
        CheckpointError: another architecture, or parts that transformers would pass over.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    kind = reader.fields["general.architecture"].contents()
    if kind not in _ARCHITECTURES:
        raise CheckpointError(
            f"{path} holds a model of architecture '{kind}'; supported: {', '.join(_ARCHITECTURES)}"
        )
    prefix = f"{kind}."
    fields = {
        name.removeprefix(prefix): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(prefix)
    }
    strange = [tensor.name for tensor in reader.tensors if not _TENSORS.fullmatch(tensor.name)]
    if kind != "qwen2":
        strange += [tensor.name for tensor in reader.tensors if tensor.name.endswith(".bias")]
    scaled = fields.get("rope.scaling.type", "none")
    strange += [f"rope.scaling.type {scaled}"] if scaled != "none" else []
    strange += [f"expert_count {fields['expert_count']}"] if fields.get("expert_count") else []
    if strange:
        raise CheckpointError(
            f"{path} has {some(strange)}, which transformers passes over in a GGUF file: the model "
            "would be another; import its folder of safetensors"
        )
    return fields


def _correct(config: Any, fields: dict[str, Any]) -> None:
    """Set what transformers leaves at its class's default."""
    width = fields.get("attention.key_length")
    if width is not None:
        config.head_dim = width
    if config.model_type != "gemma2":
        return
    # By the size of the model, as in llama.cpp: the file does not say it.
    heads, is_27b = config.num_attention_heads, config.num_hidden_layers == 46
    config.query_pre_attn_scalar = config.hidden_size // heads if is_27b else config.head_dim
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        setattr(config, name, fields.get(name, getattr(config, name)))

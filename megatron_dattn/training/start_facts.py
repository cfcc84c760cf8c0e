"""What must be the same on every rank when a run starts: settings, code, packages, tokenizer, data.

Compared over all ranks before anything is built (runtime/same_facts.py). Files that every host
reads for itself may lie in different places: there the content is compared, not the path.
"""

import dataclasses
import hashlib
import importlib.metadata
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.image_settings import PROCESSOR_FILES
from megatron_dattn.data.json_lines import INDEX_SUFFIX

MAY_DIFFER = (
    "data.tokenizer",
    "data.image_processor",
    "data.*.path",
    "data.*.image_root",
    "logging.tensorboard_dir",
    "logging.progress_bar",
)
"""Settings that name what one host reads or writes; `*` stands for a list and a place in it."""

# Those whose code computes: another release may round, order or shuffle differently.
_PACKAGES = (
    "torch",
    "megatron-core",
    "megatron-energon",
    "transformer-engine",
    "flash-attn",
    "flash-attn-3",
    "apex",
    "transformers",
    "tokenizers",
    "numpy",
    "pillow",
    "av",
)
# Enough to tell two files of the same line lengths apart without reading gigabytes.
_SAMPLED_BLOCKS = 16
_BLOCK = 4096
_PACKAGE = Path(__file__).parents[1]


def start_facts(config: PretrainConfig) -> dict[str, Any]:
    """Facts of this rank by name, comparable between ranks."""
    return {**settings_of(config), **_versions(), **_contents(config)}


def settings_of(config: PretrainConfig) -> dict[str, Any]:
    """All settings by full name but those that name what one host reads or writes."""
    flat = dict(_flatten(dataclasses.asdict(config)))
    return {name: value for name, value in flat.items() if _pattern(name) not in MAY_DIFFER}


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries and lists by dotted name; a list's length is a leaf too."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list | tuple) and any(isinstance(inner, dict) for inner in value):
        yield f"{prefix}.length", len(value)
        for place, inner in enumerate(value):
            yield from _flatten(inner, f"{prefix}.{place}")
    else:
        yield prefix, value


def _pattern(name: str) -> str:
    """`data.train.0.path` as `data.*.path`."""
    words = name.split(".")
    if len(words) == 4 and words[2].isdigit():
        return f"{words[0]}.*.{words[3]}"
    return name


def _versions() -> dict[str, Any]:
    versions: dict[str, Any] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    named = {f"version of {package}": version for package, version in versions.items()}
    return {**named, "code of megatron_dattn": code_sha256()[:16]}


@cache
def code_sha256() -> str:
    """Of all modules of this package, by name: a version number says nothing of local changes."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(_PACKAGE)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _contents(config: PretrainConfig) -> dict[str, Any]:
    data = config.data
    facts: dict[str, Any] = {}
    if data.tokenizer is not None:
        tokenizer = Path(data.tokenizer)
        processor = Path(data.image_processor or data.tokenizer)
        facts["content of data.tokenizer"] = _sha256(tokenizer / "tokenizer.json")
        for name in PROCESSOR_FILES:
            facts[f"content of {name}"] = _sha256(processor / name)
    for section in ("train", "validation"):
        for place, dataset in enumerate(getattr(data, section)):
            facts[f"content of data.{section}.{place}"] = _fingerprint(dataset)
    return facts


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        return _absence(error)


def _fingerprint(dataset: DatasetConfig) -> str:
    """The lengths of all lines, and blocks of the file taken at equal distances."""
    path = Path(dataset.path)
    try:
        digest = hashlib.sha256(Path(f"{path}{INDEX_SUFFIX}").read_bytes())
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            for block in range(_SAMPLED_BLOCKS):
                file.seek(block * max(0, size - _BLOCK) // (_SAMPLED_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    except OSError as error:
        return _absence(error)
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def _absence(error: OSError) -> str:
    """Not raised here: that a file is missing everywhere is told by whoever needs it."""
    return f"unreadable ({error.strerror})"

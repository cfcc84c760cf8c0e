"""Weights of any size that take no room, for plans of models of real size."""

import json
import os
from math import prod
from pathlib import Path

from megatron_dattn.conversion.families.weight_map import Rule


def write_empty(folder: Path, rules: list[Rule]) -> None:
    """Write model.safetensors: a header, and a hole for the values."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in ((n, s) for rule in rules for n, s in rule.sources.items()):
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)

"""Checkpoints that exist completely or not at all, and are compared before they are loaded.

`save_checkpoint` writes one (commit.py has the protocol), `find_checkpoint` finds the newest sound
one, `load_checkpoint` loads it strictly, `read_manifest` tells what it is.
"""

from megatron_dattn.checkpoint.commit import save_checkpoint
from megatron_dattn.checkpoint.discovery import (
    FoundCheckpoint,
    find_checkpoint,
    find_checkpoint_together,
    find_step,
    prune,
    steps_of,
)
from megatron_dattn.checkpoint.load import load_checkpoint
from megatron_dattn.checkpoint.manifest import Manifest, read_manifest, verify

__all__ = [
    "FoundCheckpoint",
    "Manifest",
    "find_checkpoint",
    "find_checkpoint_together",
    "find_step",
    "load_checkpoint",
    "prune",
    "read_manifest",
    "save_checkpoint",
    "steps_of",
    "verify",
]

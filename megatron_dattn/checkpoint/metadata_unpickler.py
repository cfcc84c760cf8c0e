"""Unpickles a checkpoint's `.metadata`, whichever Python wrote it, without running what it names.

The file may name the handful of classes that the index consists of and nothing else. Interpreters
differ in how they write two of them: early releases of Python 3.11 (3.11.2 of Debian 12) pickle an
enum's member as a call of `getattr`, which would hand out every attribute of everything, and Python
3.13 names pathlib's classes by a module that the others do not have.
"""

import pickle
from enum import EnumType
from pathlib import PosixPath
from typing import Any

import torch

_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "collections": {"OrderedDict"},
}


def _enum_member(owner: Any, name: Any) -> Any:
    """Stand in for `getattr` where a pickle calls it: members of enums, and nothing else.

    No enum but the allowed ones can arrive here, since a pickle reaches classes by `find_class`.
    """
    if not isinstance(owner, EnumType) or not isinstance(name, str):
        raise pickle.UnpicklingError("it calls getattr on something that is no enum")
    # Not getattr: that answers for __init__, mro and __subclasses__ of an enum as well.
    member = owner.__members__.get(name)
    if member is None:
        raise pickle.UnpicklingError(f"it calls getattr for {owner.__name__}.{name}, no member")
    return member


_REPLACED = {
    ("builtins", "getattr"): _enum_member,
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,
}


class MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of a checkpoint's index and refuses every other name.

    Raises:
        pickle.UnpicklingError: from `load`, for a name that an index does not contain.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _REPLACED:
            return _REPLACED[module, name]
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint contains")

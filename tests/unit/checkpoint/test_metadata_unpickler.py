"""An index is read whichever Python wrote it, and a hostile one reaches nothing by getattr."""

import builtins
import copyreg
import enum
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, TensorProperties

from megatron_dattn.checkpoint import load_checkpoint
from megatron_dattn.checkpoint.metadata_unpickler import MetadataUnpickler
from megatron_dattn.checkpoint.reader import read_metadata
from megatron_dattn.errors import CheckpointError
from tests.unit.checkpoint.conftest import small_state


class EarlyPickler(pickle.Pickler):
    """Writes enum members as Python 3.11.2 does, whichever interpreter runs it."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return getattr, (type(value), value.name)
        return NotImplemented


class Call:
    """A call that happens when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def as_early_python(value: Any, protocol: int = 4) -> bytes:
    buffer = io.BytesIO()
    EarlyPickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def unpickle(data: bytes) -> Any:
    return MetadataUnpickler(io.BytesIO(data)).load()


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("member", list(_MEM_FORMAT_ENCODING))
def test_an_enum_member_through_getattr(member: enum.Enum, protocol: int) -> None:
    data = as_early_python(member, protocol)
    assert b"getattr" in data
    assert unpickle(data) is member
    assert unpickle(pickle.dumps(member, protocol)) is member  # as this interpreter writes it


def test_a_checkpoint_of_early_python_is_loaded(save: Callable[[int], Path]) -> None:
    path = save(7)
    metadata = read_metadata(path)
    (path / ".metadata").write_bytes(as_early_python(metadata))
    assert b"getattr" in (path / ".metadata").read_bytes()
    loaded = load_checkpoint(path, small_state())
    assert torch.equal(loaded["model"]["body.weight"], torch.full((4, 3), 7.0))


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_a_path_as_each_interpreter_names_its_class(module: str) -> None:
    """Python 3.13 has `pathlib._local`, the others do not."""
    data = b"c" + module.encode() + b"\nPosixPath\n(V/runs\nVstep\ntR."
    assert unpickle(data) == PosixPath("/runs/step")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *(
            (_MEM_FORMAT_ENCODING, name)
            for name in (
                "__init__",
                "__subclasses__",
                "__class__",
                "__members__",
                "__reduce_ex__",
                "_member_map_",
                "_generate_next_value_",
                "mro",
                "name",
                "NO_MEMBER",
                "TORCH_CHANNELS_LAST.name",
            )
        ),
        (Metadata, "__init__"),  # classes that may be named, but are no enums
        (Metadata, "__subclasses__"),
        (TensorProperties, "create_from_tensor"),
        (OrderedDict, "fromkeys"),
        (OrderedDict, "mro"),
        (torch.float32, "to_complex"),
        (torch.Size([1]), "__class__"),
        ("text", "format"),
        (Call(getattr, _MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST"), "__class__"),
        (Call(getattr, _MEM_FORMAT_ENCODING, "__class__"), "__subclasses__"),
        (_MEM_FORMAT_ENCODING, Call(getattr, Metadata, "__doc__")),
        (_MEM_FORMAT_ENCODING, 1),
    ],
)
def test_getattr_answers_nothing_else(owner: Any, name: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match="it calls getattr"):
        unpickle(pickle.dumps(Call(getattr, owner, name)))


@pytest.mark.parametrize("arguments", [(), (_MEM_FORMAT_ENCODING,), (Metadata, "x", "default")])
def test_getattr_with_other_arguments(arguments: tuple[Any, ...]) -> None:
    with pytest.raises((TypeError, pickle.UnpicklingError)):
        unpickle(pickle.dumps(Call(getattr, *arguments)))


class Foreign(enum.Enum):
    MEMBER = 1


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Call(getattr, Foreign, "MEMBER")),
        pickle.dumps(Call(getattr, builtins.int, "from_bytes")),
        pickle.dumps(Call(setattr, _MEM_FORMAT_ENCODING, "x", 1)),
        pickle.dumps(Call(Path.touch, Path("ran"))),
        pickle.dumps(copyreg.__newobj__),  # type: ignore[attr-defined]
        b"cos\nsystem\n.",
        b"cbuiltins\ngetattr.__self__\n.",  # dotted names
        b"\x80\x04\x8c\x08builtins\x8c\x10getattr.__self__\x93.",
        b"\x80\x04\x8c\x05torch\x8c\x0dfloat32.__new\x93.",
        b"\x80\x04\x8c\x05torch\x8c\x0aSize.count\x93.",
        b"\x80\x04\x8c\x05torch\x8c\x06serial\x93.",
        b"\x80\x04\x8c%torch.distributed.checkpoint.metadata"
        b"\x8c\x1d_MEM_FORMAT_ENCODING.__init__\x93.",
        b"\x80\x04\x8c%torch.distributed.checkpoint.metadata\x8c\x02os\x93.",
        b"ctorch\nos\n.",  # a module's own imports
    ],
)
def test_no_other_name_is_found(data: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match="which no checkpoint contains"):
        unpickle(data)


def test_a_hostile_index_is_one_clear_error(tmp_path: Path) -> None:
    data = pickle.dumps(Call(getattr, Metadata, "__init__"))
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(CheckpointError, match="no enum"):
        read_metadata(tmp_path)

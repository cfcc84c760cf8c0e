"""Reads one stored chunk from a shard straight to where it belongs; memory of the host for chunks.

A shard holds every chunk as a small archive of its own (`torch.save`). Unpickling one allocates it,
and copying it to its place reads it once more; at 15 GB those passes through fresh memory cost more
than the disk. Here the archive only tells where its values begin. Copies that a save is written
from are made in the same pages every time, for the same reason.
"""

import os
from collections.abc import Sequence
from io import IOBase
from pathlib import Path
from typing import IO, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_dattn.errors import CheckpointError

_ALIGNMENT = 64


def read_chunk_into(target: Tensor, shard: Path, offset: int, length: int) -> bool:
    """Read a whole chunk into a tensor of the host.

    Args:
        target: any shape and dtype, those of the chunk; contiguous, not empty.
        shard: the file.
        offset, length: of the chunk's archive in the file, in bytes.

    Returns:
        Whether it was done. A chunk that is not stored as its plain values (a view with strides,
        say) is left to torch's own reader.

    Raises:
        CheckpointError: the file ends within the chunk.
        Exception: whatever a damaged archive makes torch raise.
    """
    assert target.is_contiguous()
    with open(shard, "rb") as file:
        start = _start_of_values(file, offset, length, target)
        if start is None:
            return False
        _read_fully(file, offset + start, target)
    return True


def _start_of_values(file: BinaryIO, offset: int, length: int, like: Tensor) -> int | None:
    """Where the values begin within an archive; None if they are not those of `like`, in order."""
    # Under the fake mode torch.load reads no values, but notes where they are.
    with FakeTensorMode():
        archive = cast(IO[bytes], _create_file_view(cast(IOBase, file), offset, length))
        stored = torch.load(archive, map_location="cpu", weights_only=True)
    plain = (
        isinstance(stored, Tensor)
        and (stored.shape, stored.dtype) == (like.shape, like.dtype)
        and stored.is_contiguous()
        and stored.storage_offset() == 0
    )
    return getattr(stored.untyped_storage(), "_checkpoint_offset", None) if plain else None


def _read_fully(file: BinaryIO, position: int, target: Tensor) -> None:
    left = target.reshape(-1).view(torch.uint8).numpy().data
    while left:
        count = os.preadv(file.fileno(), [left], position)
        if count == 0:
            raise CheckpointError(f"{file.name} ends {len(left)} bytes too early")
        position, left = position + count, left[count:]


def empty_on_host(size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Like `torch.empty`, any shape and dtype, in large pages where the system has them: numpy asks
    for these."""
    num_bytes = size.numel() * dtype.itemsize
    return torch.from_numpy(np.empty(num_bytes, np.uint8)).view(dtype).reshape(size)


class HostMemory:
    """Memory for copies of tensors, kept from one use to the next; pinned where there is a GPU.

    Fresh pages cost more than the copy into them, and pinned ones much more than that.
    """

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    @property
    def num_bytes(self) -> int:
        """Bytes that are held."""
        return self._bytes.nbytes

    def places(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors to copy these into: any shape and dtype, the same for each, without overlap.

        Those that an earlier call has given are overwritten. Each has a storage of its own bytes
        alone, as torch.save writes whole storages.
        """
        ends = [0]
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            ends.append(ends[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        self._grow(ends[-1])
        return [
            torch.from_numpy(self._bytes[start:][: tensor.numel() * tensor.element_size()])
            .view(tensor.dtype)
            .view(tensor.shape)
            for start, tensor in zip(ends, tensors, strict=False)
        ]

    def _grow(self, size: int) -> None:
        if size <= self.num_bytes:
            return
        if torch.cuda.is_available() and self.num_bytes > 0:
            unpin_memory(self._bytes.ctypes.data)
        self._bytes = np.empty(0, np.uint8)  # both at a time would not fit
        self._bytes = np.empty(size, np.uint8)
        if torch.cuda.is_available():
            pin_memory(self._bytes.ctypes.data, size)

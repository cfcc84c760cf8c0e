"""Finds, on a CPU, what would let the host wait for a device.

On a device an operation is queued and the host goes on, until it asks for a value: then it waits
for everything queued before, and launches nothing meanwhile. Where all tensors lie in host memory
nothing of it is seen. So `Waits` keeps book: parameters, what was brought to a device (`Tensor.to`
with a device, factories with `device=`) and all that was computed from these counts as on the
device, and whoever asks for a value of it is noted. To leave the device is to call `item`,
`tolist`, `numpy`, `cpu` or `to("cpu")`, or to be copied into a tensor of the host; any other
device, be it the CPU's, is the device.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Their result's value or size is asked of the device.
_ASKING = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive),
}
_LEAVING = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu"}
_INDEXING = {aten.index, aten.index_put, aten.index_put_}
# The host's Adam stands for one that a device brings.
_HOST_ONLY = ("megatron_dattn/runtime/host_adam.py",)


class Waits:
    """While entered, notes in `found` who would wait: "file: function: operation", in order."""

    def __init__(self, on_device: Iterable[Tensor]) -> None:
        self.found: list[str] = []
        # Weak: they keep no values alive, but no other storage gets the same address.
        self._storages: dict[int, StorageWeakRef] = {}
        self.mark(list(on_device))
        self._modes = (_Calls(self), _Operations(self))

    def __enter__(self) -> "Waits":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def mark(self, tree: Any) -> None:
        """Count the tensors in there as on the device."""
        for tensor in _tensors(tree):
            reference = StorageWeakRef(tensor.untyped_storage())
            self._storages.setdefault(reference.cdata, reference)

    def on_device(self, tensor: Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()).cdata in self._storages

    def note(self, operation: str) -> None:
        """Take down the innermost line of the package, or of a test that adds to it."""
        frame, place = sys._getframe(1), "outside"
        while frame is not None:
            path = frame.f_code.co_filename
            ours = "/megatron_dattn/" in path or path.rsplit("/", 1)[-1].startswith("test_")
            if ours:
                place = f"{path.rsplit('/megatron_dattn/', 1)[-1]}: {frame.f_code.co_name}"
                break
            frame = frame.f_back  # type: ignore[assignment]
        if frame is None or not frame.f_code.co_filename.endswith(_HOST_ONLY):
            self.found.append(f"{place}: {operation}")


class _Calls(TorchFunctionMode):
    """Calls that come and go between host and device: on a CPU no operation shows them."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        waits, kwargs = self._waits, kwargs or {}
        if function in _LEAVING and waits.on_device(args[0]):
            waits.note(_LEAVING[function])
        # Not as an operation: gloo copies so too, out of its own memory.
        if function is Tensor.copy_ and waits.on_device(args[0]) is not waits.on_device(args[1]):
            waits.note("copy_")
        device = next((a for a in args[1:] if isinstance(a, torch.device)), kwargs.get("device"))
        if function is Tensor.to:
            return self._to(device, args, kwargs)
        result = function(*args, **kwargs)
        if device is not None:
            if function is torch.tensor:
                waits.note("tensor(device=...)")
            waits.mark(result)
        return result

    def _to(self, device: Any, args: Any, kwargs: Any) -> Tensor:
        waits, tensor = self._waits, args[0]
        result: Tensor = tensor.to(*args[1:], **kwargs)
        was_there = waits.on_device(tensor)
        if "cpu" in (*args[1:2], device):
            if was_there:
                waits.note("to('cpu')")
        elif device is not None and not was_there:
            if not kwargs.get("non_blocking"):
                waits.note("to(device)")
            result = result.clone()
            waits.mark(result)
        return result


class _Operations(TorchDispatchMode):
    """Operations of forward and backward passes alike."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        waits, kwargs = self._waits, kwargs or {}
        if not any(waits.on_device(tensor) for tensor in _tensors((args, kwargs))):
            return operation(*args, **kwargs)
        packet = operation.overloadpacket
        asks_size = packet in _INDEXING and _asks_size(*args)
        repeats = packet is aten.repeat_interleave and kwargs.get("output_size") is None
        if packet in _ASKING or asks_size or repeats:
            waits.note(packet.__name__)
        result = operation(*args, **kwargs)
        waits.mark(result)
        return result


def _asks_size(_tensor: Tensor, indices: Any, *values: Any) -> bool:
    """Whether a mask is turned into places; a single value is written through it as it is."""
    masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
    return masked and not (values and values[0].numel() == 1)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

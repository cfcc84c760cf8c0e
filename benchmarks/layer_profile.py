"""Where a decoder layer's time goes on a CPU: its operators by kind, forward and backward.

Every operator that torch dispatches is timed by its thread's CPU time. Kinds are told by name for
products and attention kernels, and by the length of a row for all others: the FFN's middle, whole
tokens (norms, residuals), or heads (rotary embedding, gathers, merges and their gradients). What a
step takes besides its operators is Python, autograd and this clock.
"""

import resource
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import report
from benchmarks.decoder_layer import LayerBench
from megatron_dattn.planner.layer_sizes import LayerSizes

PRODUCTS, KERNELS = "products", "attention kernels"
KINDS = (PRODUCTS, KERNELS, "FFN's activation", "norms, residuals", "rotary, gathers, merges")
PASSES = ("forward", "backward")
_STEPS = 2


@dataclass(frozen=True)
class Profile:
    """CPU milliseconds of a step by (pass, kind), and the pages that it touched anew."""

    milliseconds: dict[tuple[str, str], float]
    page_faults: float

    def of_kind(self, kind: str) -> float:
        return sum(self.milliseconds.get((name, kind), 0.0) for name in PASSES)

    @property
    def total(self) -> float:
        return sum(self.milliseconds.values())

    @property
    def kernels(self) -> float:
        """Of products and attention kernels alone."""
        return self.of_kind(PRODUCTS) + self.of_kind(KERNELS)


class _Clock(TorchDispatchMode):
    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.sizes, self.name = sizes, PASSES[0]
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        started = time.thread_time()
        out = func(*args, **(kwargs or {}))
        spent = time.thread_time() - started
        self.seconds[self.name, _kind(func.overloadpacket.__name__, out, self.sizes)] += spent
        return out


def _kind(operator: str, out: Any, sizes: LayerSizes) -> str:
    if operator in ("mm", "bmm", "addmm"):
        return PRODUCTS
    if "attention" in operator:
        return KERNELS
    first = out[0] if isinstance(out, tuple | list) and out else out
    shape = first.shape if isinstance(first, Tensor) else ()
    if shape and shape[-1] in (sizes.intermediate_size, 2 * sizes.intermediate_size):
        return KINDS[2]
    # Whole tokens are [tokens, 1, H], and the statistics of norms [tokens, 1, 1].
    if len(shape) == 1 or (len(shape) == 3 and shape[1] == 1 and shape[2] != sizes.head_dim):
        return KINDS[3]
    return KINDS[4]


def profile_layer(layer: LayerBench) -> Profile:
    """The mean of some steps, after one that counts page faults without a clock."""
    faults = [_page_faults(layer) for _ in range(_STEPS)]
    clock = _Clock(layer.bench.sizes)
    for _ in range(_STEPS):
        layer.drop_gradients()
        layer.model.set_input_tensor(layer.tokens)
        with clock:
            clock.name = PASSES[0]
            out = layer.model(None, layer.attention)
            clock.name = PASSES[1]
            out.backward(layer.gradient)
    milliseconds = {key: 1000 * spent / _STEPS for key, spent in clock.seconds.items()}
    return Profile(milliseconds, statistics.median(faults))


def _page_faults(layer: LayerBench) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layer.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def profile_table(profiles: dict[tuple[str, int], Profile]) -> str:
    """A row for every variant and number of visual tokens: `forward + backward` ms of each kind."""
    columns = ["variant", "visual tokens", *KINDS, "the last three, of all", "page faults"]
    rows = []
    for (variant, visual), found in profiles.items():
        cells = [
            " + ".join(f"{found.milliseconds.get((name, kind), 0.0):.1f}" for name in PASSES)
            for kind in KINDS
        ]
        rest = f"{100 * (1 - found.kernels / found.total):.1f} %"
        rows.append([variant, str(visual), *cells, rest, f"{found.page_faults:.0f}"])
    return report.table(columns, rows)

"""How many operations a decoder layer launches on a device, so that their number cannot creep up.

Counted where there is no device: a forward and backward pass of a deeper model less that of a
shallower one, on the ragged backend over stand-ins for its kernels. An attention kernel counts as
one operation, and so does a fused chain (`attention/gather.py`); views and fresh room as none. The
norms, one kernel on CUDA, are the chains of operations that they are on a CPU.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megatron_dattn.attention import gather
from megatron_dattn.attention.backends import cuda_flash
from megatron_dattn.models import vlm
from tests.support.vlm import make_batch, tiny_model, tiny_model_config
from tests.unit.attention.backends import varlen_kernels

pytestmark = pytest.mark.usefixtures("one_process")


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not (func.is_view or "empty" in name or "view" in name):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def _as_one(name: str, function: Callable[..., Any], counted: Counter[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        counted[name] += 1
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def _pass(preset: str, num_layers: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Operations of one micro-batch, forward and backward."""
    model = tiny_model(tiny_model_config(preset, num_hidden_layers=num_layers))
    batch = make_batch([9, 7, 4], [(2,), (), (1,)])
    with _Operations() as operations, monkeypatch.context() as patch:
        found = operations.found
        for name in ("_forward", "_backward"):
            kernel = getattr(varlen_kernels, "aten" + name)
            patch.setattr(cuda_flash, name, _as_one("flash" + name, kernel, found))
        patch.setattr(vlm, "select_backend", lambda *args, **named: cuda_flash.CudaFlashBackend())
        patch.setattr(gather, "_is_cuda", lambda values: True)
        patch.setattr(gather, "_compiled", lambda f: _as_one(f"fused {f.__name__}", f, found))
        model(batch).sum().backward()
    return found


# On a device there were 165 and 152 before chains were fused. Norms and the gated activation are
# 43 of either here, which a device does in 10. dattn: 18 products (Q, KV, output of either kind,
# FFN 2; twice each backward), of which 4 are batched, 4 kernels, 7 fused chains, 2 of
# log-sum-exps, and the rest residuals, gradients that add up, and rows joined for a product.
# s_attn has one part less.
MOST = {"dattn": 103, "s_attn": 75}


@pytest.mark.parametrize("preset", MOST)
def test_a_layer_launches_no_more_than_this(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (_pass(preset, layers, monkeypatch) for layers in (2, 4))
    of_a_layer = {name: (many[name] - few[name]) / 2 for name in many if many[name] > few[name]}
    assert sum(of_a_layer.values()) <= MOST[preset], of_a_layer

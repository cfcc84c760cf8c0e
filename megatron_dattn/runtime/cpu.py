"""Lets megatron-core train where there is no CUDA device, over gloo.

megatron-core names CUDA in the middle of its engine: devices of buffers, random states, type
strings. `enable_cpu_runtime` redirects exactly those places to the host, so that the very same
model, optimizer, schedules and checkpoints run in tests and demonstrations on any machine. What has
no meaning on the host is left alone and keeps raising torch's "not compiled with CUDA enabled".
Where CUDA is available nothing is touched. Line numbers refer to megatron-core 0.16.1.
"""

import functools
import importlib
import logging
import resource
import sys
import types
from collections.abc import Callable
from typing import Any

import psutil
import torch

from megatron_dattn.runtime.log import silence_import_warnings

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")

# The modules that pass the literal device="cuda" to a factory of torch. Each sees `torch` through
# a `_HostTorch`, so that no factory is replaced for anybody else.
MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.dist_checkpointing.exchange_utils",  # 98-110 shards to receive, 326 empty shard
    "megatron.core.dist_checkpointing.mapping",  # init_data("cuda") of exchange_utils.py:98,106
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",  # 204 agreement on reuse
    "megatron.core.distributed.param_and_grad_buffer",  # 768 user buffer warm-up
    "megatron.core.optimizer.clip_grads",  # 90-115 norm, 174 clip, 207 zeros
    "megatron.core.optimizer.grad_scaler",  # 15, 88-94 loss scales
    "megatron.core.optimizer.optimizer",  # 473-485 overflow flags, 907 scale of the FP32 optimizer
    "megatron.core.pipeline_parallel.schedules",  # 596, 983, 2138 token counters
    "megatron.core.rerun_state_machine",  # 261, 265 validated values
    "megatron.core.tensor_parallel.data",  # 37 sizes to broadcast
    "megatron.core.transformer.utils",  # 35, 40 default masks
    "megatron.core.utils",  # 1207 gradient norm without apex
)

_active = False


def cpu_runtime_active() -> bool:
    """True if `enable_cpu_runtime` has redirected megatron-core to the host."""
    return _active


def enable_cpu_runtime() -> None:
    """Redirect megatron-core's CUDA calls to the host; does nothing where CUDA is available.

    Call it before the first megatron module is built; calling it again does no harm. Calling it
    before megatron-core is imported also keeps its notices about missing GPU packages quiet.
    """
    global _active
    if torch.cuda.is_available():
        logger.info("CUDA is available: the CPU runtime stays off")
        return
    if _active:
        return
    silence_import_warnings()
    _redirect_cuda_module()
    _redirect_tensor_methods()
    _redirect_factories()
    _redirect_random_states()
    _use_host_optimizer()
    _compile_nothing()
    _active = True
    logger.info("no CUDA device: megatron-core runs on the CPU (gloo, host Adam, no torch.compile)")


def _redirect_cuda_module() -> None:
    """The functions of torch.cuda that the training path calls and that have a host meaning."""
    redirections: dict[str, Callable[..., Any]] = {
        # Every buffer is made on it: param_and_grad_buffer.py:775-806, layers.py:251, 899, 1197,
        # p2p_communication.py:190-321, rotary_pos_embedding.py:78, and 160 more places.
        "current_device": lambda: CPU,
        # Asked for before every reduction since 0.19 (param_and_grad_buffer.py:632), for events of
        # CUDA graphs to wait for; the host has neither.
        "current_stream": lambda device=None: None,
        # p2p_communication.py:242, 398, timers.py:152, 165, fully_parallel.py:272: the host is
        # always in step with itself.
        "synchronize": lambda device=None: None,
        # optimizer.py:362 after moving states away: the host allocator keeps no such cache.
        "empty_cache": lambda: None,
        # random.py:235-238 and 422, rerun_state_machine.py:957, 970: one generator serves both.
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda new_state, device="cuda": torch.set_rng_state(new_state),
        # Whoever reports memory (ours and megatron-core's timers alike) gets the process's own.
        "memory_allocated": lambda device=None: _resident_bytes(),
        "max_memory_allocated": lambda device=None: _peak_resident_bytes(),
    }
    for name, function in redirections.items():
        setattr(torch.cuda, name, function)
    # random.py:55 reaches it under its full name.
    torch.cuda.random.get_rng_state = redirections["get_rng_state"]


def _resident_bytes() -> int:
    """Resident set size of this process now."""
    return psutil.Process().memory_info().rss


def _peak_resident_bytes() -> int:
    """Largest resident set size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
    return max(peak, _resident_bytes())  # the kernel updates the peak a little late


def _redirect_tensor_methods() -> None:
    """`.cuda()` stays where it is; `.type()` answers megatron-core's optimizers as they expect."""

    def stay(self: Any, device: Any = None, **options: Any) -> Any:
        return self

    # data.py:84, language_module.py:244, rope_utils.py:64, exchange_utils.py:336, utils.py:898.
    torch.Tensor.cuda = stay  # type: ignore[assignment,method-assign]
    torch.nn.Module.cuda = stay  # type: ignore[method-assign]
    original = torch.Tensor.type

    @functools.wraps(original)
    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **options: Any) -> Any:
        answer = original(self, dtype, *args, **options)
        if dtype is not None:
            return answer
        # optimizer.py:671, 690, distrib_optimizer.py:361, 420, 582, clip_grads.py:167 compare with
        # 'torch.cuda.FloatTensor'; everybody else is told the truth.
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_name  # type: ignore[assignment,method-assign]


class _HostTorch(types.ModuleType):
    """The name `torch` of one megatron-core module: factories asked for "cuda" make host tensors.

    Everything else, future attributes included, is torch's own.
    """

    def __init__(self) -> None:
        super().__init__("torch", torch.__doc__)
        for name in ("empty", "empty_like", "ones", "tensor", "zeros"):
            setattr(self, name, _on_host(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def redirected(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if device is not None and torch.device(device).type == "cuda":
            device = CPU
        return factory(*args, device=device, **options)

    return redirected


def _redirect_factories() -> None:
    host_torch = _HostTorch()
    for name in MODULES_WITH_CUDA_LITERALS:
        importlib.import_module(name).torch = host_torch  # type: ignore[attr-defined]


def _redirect_random_states() -> None:
    """The tensor-parallel random tracker forks the one host generator."""
    tracker = importlib.import_module("megatron.core.tensor_parallel.random")

    def set_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        assert not graph_safe, "CUDA graphs have no generator on the host"
        torch.set_rng_state(new_state)

    # random.py:72: its own version queues the call until CUDA is initialized, which is never.
    tracker._set_cuda_rng_state = set_state  # type: ignore[attr-defined]
    # random.py:263 warns at each fork that the host generator moved; here that is the purpose.
    logging.getLogger(tracker.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )


def _use_host_optimizer() -> None:
    """Hand megatron-core an Adam with FusedAdam's contract in place of torch's.

    With torch's AdamW the distributed optimizer cannot load a checkpoint (distrib_optimizer.py:940
    looks for a saved 'step' of every parameter) nor save before the first step (:641).
    """
    from megatron_dattn.runtime.host_adam import HostAdam

    optimizer = importlib.import_module("megatron.core.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return  # Transformer Engine or apex brought its own
    # __init__.py:359 chooses the class and the arguments by this flag, distrib_optimizer.py:640-682
    # and 818 the place where the step count lives; 515 checks the class.
    optimizer.USING_PYTORCH_OPTIMIZER = False  # type: ignore[attr-defined]
    optimizer.Adam = HostAdam  # type: ignore[attr-defined]
    distributed.Adam = HostAdam  # type: ignore[attr-defined]
    distributed.HAVE_APEX_OR_TE = True  # type: ignore[attr-defined]
    distributed.USING_APEX_OPTIMIZER = True  # type: ignore[attr-defined]


def _compile_nothing() -> None:
    """Keep @jit_fuser, which is torch.compile (jit.py:21), from calling a C++ compiler.

    It would for functions of two lines, for example activations.py:14 fast_gelu. Where
    megatron-core is imported after `silence_import_warnings` there is nothing to keep from it, and
    no need to import the compiler for that.
    """
    if importlib.import_module("megatron.core.jit").jit_fuser is torch.compile:
        torch.compiler.set_stance("force_eager")

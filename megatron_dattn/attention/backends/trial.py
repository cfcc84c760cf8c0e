"""A tiny forward and backward pass of a backend on the device, before a run relies on it.

A package can be installed, load and still not run: built for other GPUs, without this head_dim, or
a release whose arguments are not ours.
"""

import torch

from megatron_dattn.attention.backends.base import Backend, ScoreFunction
from megatron_dattn.attention.plan.index import TokenIndex
from megatron_dattn.attention.plan.parts import Part, cu_seqlens
from megatron_dattn.errors import shortened


def trial_failure(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    softcap: float | None = None,
) -> str | None:
    """The reason why a causal and an unmasked part do not pass the backend; None if they do.

    What comes out is not judged: tests/gpu compares it with the oracle.
    """
    try:
        for part in (_part("T2T", (3, 5), device), _part("T2V", (4, 2), device)):
            _pass_through(backend, part, dtype, head_dim, softcap)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a kernel that fails is else heard of later, elsewhere
    except Exception as error:  # whatever a foreign package raises, it cannot be relied on
        lines = str(error).strip().splitlines() or ["no message"]
        return f"{type(error).__name__}: {shortened(lines[0], 200)}"
    return None


def _part(name: str, key_lengths: tuple[int, ...], device: torch.device) -> Part:
    query_lengths, causal = (3, 5), name == "T2T"
    part = Part(
        name,
        TokenIndex(sum(query_lengths)),
        TokenIndex(sum(key_lengths)),
        query_lengths,
        key_lengths,
        causal=causal,
        rotary=causal,
        query_cu_seqlens=cu_seqlens(query_lengths),
        key_cu_seqlens=cu_seqlens(key_lengths),
    )
    return part.with_tensors(lambda tensor: tensor.to(device))


def _pass_through(
    backend: Backend, part: Part, dtype: torch.dtype, head_dim: int, softcap: float | None
) -> None:
    # Four query heads on two key heads: grouped heads are cases of their own in the kernels.
    query = torch.ones(part.query_tokens.length, 4, head_dim, dtype=dtype, device=part.device)
    key = torch.ones(part.key_tokens.length, 2, head_dim, dtype=dtype, device=part.device)
    function = ScoreFunction(head_dim**-0.5, softcap)
    out, lse = backend.forward(query, key, key, part, function)
    backend.backward(query, query, key, key, out.to(dtype), lse, part, function)

"""What counts as a lost rank, and how those are found and spelled that say nothing."""

import pytest
import torch.distributed as dist

from megatron_dattn.errors import CheckpointError
from megatron_dattn.runtime import lost_ranks
from megatron_dattn.runtime.lost_ranks import is_loss
from megatron_dattn.runtime.rank_errors import on_all_ranks

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
CLOSED = f"{GLOO}pair.cc:553] Connection closed by peer [10.0.0.7]:64739. This is typically caused"
TIMED_OUT = f"{GLOO}unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"
WRONG_SIZE = (
    "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:446] "
    "op.preamble.length <= op.nbytes. 8 vs 4"
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(CLOSED), True),
        (RuntimeError(TIMED_OUT), True),
        (RuntimeError("Gloo connectFullMesh failed with ..."), True),
        (dist.DistNetworkError("Broken pipe"), True),
        (dist.DistStoreError("wait timeout after 600000ms, keys: /default_pg/0//cpu//0/1"), True),
        (dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL("), True),
        (dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited or there was"), True),
        (dist.DistBackendError("NCCL error in: x.cpp:1, invalid usage"), False),
        (RuntimeError(WRONG_SIZE), False),
        (RuntimeError("ProcessGroupGloo::allreduce: invalid tensor type"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("DataLoader timed out after 60 seconds"), False),
        (TimeoutError("timed out"), False),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_what_counts_as_a_loss(error: Exception, expected: bool) -> None:
    """Wrong use of gloo or NCCL is a bug of ours and keeps its traceback."""
    assert is_loss(error) is expected


def test_the_reason_is_one_short_sentence() -> None:
    assert lost_ranks._reason(RuntimeError(CLOSED)) == "Connection closed by peer [10.0.0.7]:64739"
    assert lost_ranks._reason(RuntimeError(f"{TIMED_OUT}\nframe #0")).startswith(
        "Timed out waiting"
    )
    assert lost_ranks._reason(RuntimeError("")) == "RuntimeError"


def test_a_loss_is_no_checkpoint_error() -> None:
    """Work of a save that fails because a peer is gone is not that save's failure."""

    def fail(text: str) -> None:
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match="closed by peer"):
        on_all_ranks("hashing", lambda: fail(CLOSED))
    with pytest.raises(CheckpointError):
        on_all_ranks("hashing", lambda: fail("no such tensor"))


class CountingStore:
    """Knows the reports and hosts of some ranks."""

    def __init__(self, size: int, missing: set[int]) -> None:
        self.keys = {f"lost: report of {rank}" for rank in range(size) if rank not in missing}
        self.keys |= {f"host of rank {rank}" for rank in range(size)}
        self.num_requests = 0

    def check(self, keys: list[str]) -> bool:
        self.num_requests += 1
        return self.keys.issuperset(keys)

    def get(self, key: str) -> bytes:
        self.num_requests += 1
        return f"gpu{int(key.split()[-1]) // 8:03d}".encode()


def inquiry(missing: set[int], monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1024)
    store = CountingStore(1024, missing)
    return lost_ranks._Inquiry(store)._judge(), store.num_requests


def test_one_of_1024_is_found_in_few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    said, num_requests = inquiry({700}, monkeypatch)
    assert said == "rank 700 on gpu087 does not answer"
    assert num_requests < 30


def test_many_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    said, _ = inquiry(set(range(64, 128)), monkeypatch)
    assert said.startswith("ranks 64, 65, 66, 67, 68, 69, 70, 71 and 56 more on gpu008, gpu009, ")
    assert said.endswith("do not answer")
    assert len(said) < 150


def test_none_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    said, num_requests = inquiry(set(), monkeypatch)
    assert said.startswith("all ranks are there, but")
    assert num_requests == 2

"""Model tests run in one process with megatron-core's groups of size one."""

from collections.abc import Iterator

import pytest

from megatron_dattn.runtime.cpu import enable_cpu_runtime

enable_cpu_runtime()  # before anything imports megatron-core

from megatron_dattn.runtime.distributed import destroy_distributed  # noqa: E402
from tests.support.megatron import init_model_parallel  # noqa: E402


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """Model-parallel groups of one rank, and seeded random states."""
    init_model_parallel()
    yield
    destroy_distributed()

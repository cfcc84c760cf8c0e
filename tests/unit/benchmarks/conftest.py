"""Layers are built in one process with megatron-core's groups of size one."""

from collections.abc import Iterator

import pytest

from megatron_dattn.runtime.cpu import enable_cpu_runtime

enable_cpu_runtime()  # before anything imports megatron-core

from megatron_dattn.runtime.distributed import (  # noqa: E402
    destroy_distributed,
    initialize_distributed,
)


@pytest.fixture
def one_process() -> Iterator[None]:
    """Model-parallel groups of one rank."""
    initialize_distributed()
    yield
    destroy_distributed()

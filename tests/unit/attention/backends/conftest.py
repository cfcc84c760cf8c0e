"""Kernels that a test installs or removes are looked for anew."""

from collections.abc import Iterator

import pytest

from megatron_dattn.attention import select_backend


@pytest.fixture(autouse=True)
def _nothing_selected() -> Iterator[None]:
    select_backend.cache_clear()
    yield
    select_backend.cache_clear()

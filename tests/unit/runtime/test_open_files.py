"""The limit on open files: raised where that is allowed, named where it is not."""

import resource

import pytest

from megatron_dattn.errors import ConfigError
from megatron_dattn.runtime import open_files
from megatron_dattn.runtime.open_files import open_files_needed, require_open_files

UNLIMITED = resource.RLIM_INFINITY


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The limit of a pretended process: the last of the list, which a call can add to."""
    values: list[tuple[int, int]] = []
    monkeypatch.setattr(open_files.resource, "getrlimit", lambda kind: values[-1])
    monkeypatch.setattr(open_files.resource, "setrlimit", lambda kind, limit: values.append(limit))
    return values


def test_what_was_measured_is_enough() -> None:
    """The figures of the module's docstring."""
    for workers, measured in ((0, 94), (2, 123), (4, 145), (8, 194)):
        assert measured < open_files_needed(workers, 1) < 1.5 * measured
    assert open_files_needed(2, 8) < 1024, "a usual limit takes a usual host"


@pytest.mark.parametrize("limit", [(160, 160), (1024, UNLIMITED), (UNLIMITED, UNLIMITED)])
def test_enough_is_left_alone(limits: list[tuple[int, int]], limit: tuple[int, int]) -> None:
    limits.append(limit)
    require_open_files(160)
    assert limits == [limit]


@pytest.mark.parametrize("hard", [160, 4096, UNLIMITED])
def test_a_limit_that_may_be_raised_is(limits: list[tuple[int, int]], hard: int) -> None:
    limits.append((64, hard))
    require_open_files(160)
    assert limits[-1] == (160, hard)


def test_a_limit_that_may_not_is_named(limits: list[tuple[int, int]]) -> None:
    limits.append((20, 64))
    with pytest.raises(ConfigError, match=r"have 64 files .*ulimit -n.* up to 160: raise"):
        require_open_files(160)
    assert limits == [(20, 64)]

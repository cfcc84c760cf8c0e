"""Choosing a backend: automatically, by name, and not at all."""

import logging
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from megatron_dattn.attention.backends import flash_attn2, flash_attn3, select
from megatron_dattn.attention.backends.select import select_backend
from megatron_dattn.errors import ConfigError
from megatron_dattn.models.execution import BackendName


def test_the_setting_has_the_names_of_the_backends() -> None:
    """It spells them in a second place, which needs no torch."""
    assert get_args(BackendName) == ("auto", *select.BACKENDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_cpu_gets_its_flash_kernel(dtype: torch.dtype) -> None:
    assert select_backend("auto", "cpu", dtype, 32).name == "cpu_flash"


def test_what_no_kernel_supports_is_done_by_matrix_products() -> None:
    assert select_backend("auto", "meta", torch.float32, 32).name == "math"


@pytest.mark.parametrize("name", ["math", "cpu_flash"])
def test_a_backend_can_be_asked_for_by_name(name: str) -> None:
    assert select_backend(name, torch.device("cpu"), torch.float32, 32).name == name


def test_a_choice_that_cannot_run_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="'cuda_flash' cannot be used: it needs a CUDA device"):
        select_backend("cuda_flash", "cpu", torch.bfloat16, 128)


@pytest.mark.parametrize("name", ["cpu_flash", "cuda_flash"])
def test_a_softcap_that_a_kernel_lacks_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_attn2, "flash_attn_version", lambda: None)
    monkeypatch.setattr(flash_attn3, "has_flash_attn3", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(select, "trial_failure", lambda *arguments: None)
    device = name.removesuffix("_flash")
    with pytest.raises(ConfigError, match=f"'{name}' cannot be used: its kernel has no softcap"):
        select_backend(name, device, torch.bfloat16, 64, softcap=50.0)
    assert select_backend("auto", device, torch.bfloat16, 64, softcap=50.0).name == "math"
    assert select_backend("auto", device, torch.bfloat16, 64).name == name


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="'flash4'; choose auto or one of flash_attn3, flash_attn2"
    ):
        select_backend("flash4", "cpu", torch.float32, 32)


def test_the_page_lists_them_in_their_order() -> None:
    page = Path(__file__).resolve().parents[4] / "docs" / "attention.md"
    section = page.read_text(encoding="utf-8").partition("## Backends")[2].partition("\n| | ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.M) == list(select.BACKENDS)


def test_a_choice_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    select._announce.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            select_backend("auto", "cpu", torch.float32, 40)
    assert caplog.messages == ["attention backend: cpu_flash (cpu, torch.float32, head_dim 40)"]

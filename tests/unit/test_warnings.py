"""A warning that our code gives or earns fails its test; those of libraries do not."""

import warnings

import pytest

WARNING = "import warnings; warnings.warn('about something', UserWarning)"


@pytest.mark.parametrize("name", ["megatron_dattn.data.images", "tools.generate", "pretrain_vlm"])
def test_a_warning_of_our_own_is_an_error(name: str) -> None:
    with pytest.raises(UserWarning, match="about something"):
        exec(WARNING, {"__name__": name})


@pytest.mark.parametrize("name", ["megatron.core.optimizer", "toolsmith", "torch.nn"])
def test_a_foreign_warning_is_none(name: str) -> None:
    with warnings.catch_warnings(record=True):
        exec(WARNING, {"__name__": name})

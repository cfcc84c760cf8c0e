"""Which module a parameter belongs to, and what is frozen."""

import pytest
import torch

from megatron_dattn.config.training import ModuleLearningRates
from megatron_dattn.errors import ConfigError
from megatron_dattn.training.stages import freeze_modules, module_of_parameter, trained_modules


@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
def test_module_of_a_wrapped_parameter(prefix: str) -> None:
    assert module_of_parameter(f"{prefix}adapter.norm.weight") == "adapter"
    assert module_of_parameter(f"{prefix}language_model.decoder.x") == "language_model"
    gate = f"{prefix}language_model.decoder.layers.3.self_attention.gate"
    assert module_of_parameter(gate) == "adapter"


def test_zero_is_a_value() -> None:
    rates = ModuleLearningRates(vision_model=0.0, adapter=1e-3, language_model=2e-5)
    assert trained_modules(rates) == ("adapter", "language_model")
    model = torch.nn.ModuleDict(
        {name: torch.nn.Linear(2, 2) for name in ("vision_model", "adapter", "language_model")}
    )
    freeze_modules(model, rates)
    trainable = {module_of_parameter(n) for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"adapter", "language_model"}


def test_training_nothing_or_negative_rates_are_refused() -> None:
    with pytest.raises(ConfigError, match="nothing"):
        ModuleLearningRates(vision_model=0.0, adapter=0.0, language_model=0.0)
    with pytest.raises(ConfigError, match="negative"):
        ModuleLearningRates(adapter=-1e-3)

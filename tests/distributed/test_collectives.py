"""How many messages tensor-parallel ranks exchange in a step: the number must not creep up."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
from megatron.core import parallel_state

from megatron_dattn.config.training import ModuleLearningRates
from tests.support.distributed import run_distributed

ADAPTER_ALONE = ModuleLearningRates(vision_model=0.0, adapter=1e-3, language_model=0.0)


def _collectives(layers: int, settings: dict[str, Any]) -> Counter[str]:
    """Of the second of two steps of one pack, inside the tensor-parallel group."""
    from megatron_dattn.training.step import train_step
    from tests.support.collectives import Collectives
    from tests.support.training import build_run, training_config
    from tests.support.vlm import make_batch, tiny_model_config

    config = training_config(tensor=2, **settings)
    model = tiny_model_config(config.model.attention, num_hidden_layers=layers)
    config = dataclasses.replace(config, model=model)
    run = build_run(config, [make_batch([9, 7], [(2,), ()], seed=i) for i in range(2)])
    train_step(run)
    with Collectives(parallel_state.get_tensor_model_parallel_group()) as collectives:
        train_step(run)
    return collectives.found


def _two_depths(settings: dict[str, Any]) -> tuple[Counter[str], Counter[str]]:
    shallow = _collectives(3, settings)
    parallel_state.destroy_model_parallel()
    return shallow, _collectives(4, settings)


# Per decoder layer. Forward: what attention and FFN read is gathered, what they add is scattered.
# Backward: the same for the gradients, and what trained weights read is gathered once more.
TRAINED = {"all-gather": 2 + 2 + 2, "reduce-scatter": 2 + 2}
FROZEN = {"all-gather": 2 + 2, "reduce-scatter": 2 + 2}
# Besides: features of the images, and gradients of what enters the decoder; embedding, adapter
# (forward and backward), labelled tokens and their gradient, three in the loss; pixels of the pack.
STAGE_1 = {"all-gather": 1 + 1, "all-reduce": 1 + 2 + 2 + 3, "broadcast_": 1}
# Gradients of the decoder's norms, and of the encoder.
STAGE_2 = {**STAGE_1, "all-reduce": STAGE_1["all-reduce"] + 1 + 1}
# Two layers of two messages forward and two backward; no features to gather, no gradients to sum.
CUT_ENCODER = {**STAGE_1, "all-gather": 1, "all-reduce": STAGE_1["all-reduce"] + 1 + 2 * (2 + 2)}


@pytest.mark.parametrize(
    ("settings", "per_layer", "besides"),
    [
        ({"attention": "dattn"}, TRAINED, STAGE_2),
        ({"attention": "s_attn"}, TRAINED, STAGE_2),
        ({"attention": "dattn", "rates": ADAPTER_ALONE}, FROZEN, STAGE_1),
        ({"attention": "dattn", "encoder_tp_mode": "weights"}, TRAINED, CUT_ENCODER),
    ],
    ids=["dattn", "s_attn", "dattn-stage-1", "dattn-cut-encoder"],
)
def test_messages_of_a_step(
    settings: dict[str, Any], per_layer: dict[str, int], besides: dict[str, int]
) -> None:
    for three, four in run_distributed(_two_depths, 2, settings):
        assert four - three == per_layer
        assert three - Counter({kind: 3 * number for kind, number in per_layer.items()}) == besides


def _messages_of_packs(settings: dict[str, Any]) -> int:
    """Broadcasts of a step to all ranks that work on the same packs."""
    from megatron_dattn.training.step import train_step
    from tests.support.collectives import Collectives
    from tests.support.training import build_run, training_config
    from tests.support.vlm import make_batch

    packs = [make_batch([9, 7], [(2,), ()], seed=i) for i in range(settings["num_packs"])]
    run = build_run(training_config(**settings), packs)
    with Collectives(parallel_state.get_model_parallel_group()) as collectives:
        train_step(run)
    return collectives.found["broadcast_"]


@pytest.mark.parametrize("num_packs", [1, 3])
def test_packs_of_a_step_are_one_message_behind_its_length(num_packs: int) -> None:
    assert run_distributed(_messages_of_packs, 2, {"num_packs": num_packs, "pipeline": 2}) == [2, 2]

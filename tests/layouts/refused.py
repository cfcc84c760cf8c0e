"""Combinations that a start refuses, each with what it answers: the list of docs/parallelism.md."""

from dataclasses import dataclass, field
from typing import Any

from megatron_dattn.config.training import ModuleLearningRates
from megatron_dattn.errors import ConfigError
from megatron_dattn.training.run_plan import make_plan
from tests.layouts.cells import Cell
from tests.layouts.layout import Layout


@dataclass(frozen=True)
class Refused:
    """Settings of a run of the matrix's model, and on how many ranks."""

    what: str
    num_ranks: int
    settings: dict[str, Any] = field(default_factory=dict)


REFUSED = (
    Refused("sizes whose product does not divide the ranks", 6, {"tensor": 2, "pipeline": 2}),
    Refused("more tensor-parallel ranks than key heads", 8, {"tensor": 8}),
    Refused("sequence parallelism of one rank", 1, {"sequence_parallel": True}),
    Refused(
        "visual tokens that its ranks cannot share",
        4,
        {"tensor": 4, "sequence_parallel": True, "visual_budget": 38},
    ),
    Refused(
        "text tokens that its ranks cannot share",
        4,
        {"tensor": 4, "sequence_parallel": True, "text_budget": 30},
    ),
    Refused("an encoder whose heads cannot be cut", 4, {"tensor": 4, "encoder_tp_mode": "weights"}),
    Refused("layers that the pipeline stages cannot share", 3, {"pipeline": 3}),
    Refused("more pipeline stages than layers", 8, {"pipeline": 8}),
    Refused("groups of layers without a pipeline", 1, {"virtual_pipeline_model_parallel_size": 2}),
    Refused(
        "groups that the layers of a pipeline stage cannot make",
        2,
        {"pipeline": 2, "virtual_pipeline_model_parallel_size": 3},
    ),
    Refused(
        "packs that interleaved pipeline stages cannot pass on in groups",
        2,
        {"pipeline": 2, "virtual_pipeline_model_parallel_size": 2, "num_packs": 5},
    ),
    Refused("an uneven stage without pipeline", 1, {"num_layers_in_first_pipeline_stage": 1}),
    Refused(
        "uneven stages that leave none to the others",
        3,
        {
            "pipeline": 3,
            "num_layers_in_first_pipeline_stage": 2,
            "num_layers_in_last_pipeline_stage": 2,
        },
    ),
    Refused("a batch that the data-parallel ranks cannot share", 3, {"num_packs": 4}),
    Refused("FP8 in shares of a width that it cannot take", 2, {"tensor": 2, "fp8": "hybrid"}),
)


def answer(refused: Refused) -> str:
    """What the start of such a run says.

    Raises:
        AssertionError: it is not refused.
    """
    settings = {"rates": ModuleLearningRates(), **refused.settings}
    try:
        make_plan(Cell(Layout("dp1"), "dattn", "mistral", 3).config(**settings), refused.num_ranks)
    except ConfigError as error:
        return str(error)
    raise AssertionError(f"{refused.what} is not refused")


def list_of_answers() -> str:
    """The list in Markdown."""
    return "\n".join(f"- {refused.what}: *{answer(refused)}*" for refused in REFUSED)

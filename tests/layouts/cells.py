"""What is compared: layouts, each for several models and stages of training.

Every cell trains a model of four layers for some steps of four ragged packs: samples without image
beside others, two images in one text, a pack without any image, a pack without any label.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from megatron_dattn.attention.presets import get_preset
from megatron_dattn.batch import PackedBatch
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.training import ModuleLearningRates
from megatron_dattn.parallel.context.supported import unserved
from tests.layouts.layout import Layout
from tests.support.training import ALL_RATES, training_config
from tests.support.vlm import make_batch, tiny_model_config

ATTENTIONS = ("dattn", "s_attn")
FAMILIES = ("mistral", "gemma2")
STAGES = (1, 3)
STEPS = 5
PACKS_PER_STEP = 4
ALONE = Layout("dp1")
# Four layers make a pipeline of four; eight and four heads are cut by four ranks.
_SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
_RATES = {1: ModuleLearningRates(adapter=2e-3), 2: ALL_RATES, 3: ALL_RATES}

LAYOUTS = (
    *("tp2", "tp2+sp", "tp4+sp", "pp2", "pp4", "pp2xvp2", "tp2xpp2+sp", "dp2", "dp2+distopt"),
    *("cp2", "cp4", "cp2xtp2+sp", "cp2xpp2"),
)
"""For all models and stages; of attentions, context parallelism serves `dattn` alone."""
FURTHER_LAYOUTS = (
    *("tp2+sp+full", "tp2+sp+selective", "tp2+sp+chunks", "tp2+sp+weights"),
    *("pp2+full", "pp2+selective", "pp2+chunks", "pp2+uneven", "pp2+tied", "pp4+tied"),
    *("tp2xpp2+sp+full", "tp2xpp2+sp+tied", "tp4+sp+tied"),
    *("dp2+overlap", "dp2+distopt+overlap", "dp4+distopt", "tp2xdp2+sp+distopt"),
    *("pp2xvp2+tied", "tp2xpp2xvp2+sp+full", "pp2xvp2xdp2+distopt+overlap", "cp2xpp2xvp2"),
    *("pp2xdp2+distopt", "pp2xdp2+overlap", "pp2xdp2+distopt+overlap+full"),
    *("cp2+full", "cp2+distopt", "cp2xdp2+distopt+overlap", "cp2xpp2+tied"),
)
"""For all models in stage 3, which trains everything."""
IN_EVERY_TEST_RUN = (
    *("tp2+sp/dattn/gemma2/3", "pp2/s_attn/mistral/1", "pp2+uneven/dattn/mistral/3"),
    *("dp2+distopt/dattn/mistral/3", "tp2xpp2+sp+tied/dattn/gemma2/3", "pp4/dattn/mistral/1"),
    *("tp4+sp/s_attn/gemma2/3", "pp2xdp2+distopt/dattn/mistral/3", "pp2xvp2/dattn/gemma2/3"),
    *("cp2xtp2+sp/dattn/gemma2/3", "cp2xpp2/dattn/mistral/1"),
)
"""Cells of `make test`; `make test-parallel` runs all."""


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """A layout, a model and a stage of training."""

    layout: Layout
    attention: str
    family: str
    stage: int

    def __str__(self) -> str:
        return f"{self.layout.name}/{self.attention}/{self.family}/{self.stage}"

    @staticmethod
    def parse(name: str) -> "Cell":
        layout, attention, family, stage = name.split("/")
        return Cell(Layout(layout), attention, family, int(stage))

    @property
    def is_tied(self) -> bool:
        return "tied" in self.layout.options

    @property
    def is_served(self) -> bool:
        """Context parallelism refuses attentions whose visual tokens see others."""
        is_shared = "context_parallel_size" in self.layout.settings
        return not is_shared or unserved(get_preset(self.attention)) is None

    @property
    def alone(self) -> "Cell":
        """The same training in one process, with nothing recomputed."""
        layout = Layout(f"{ALONE.name}+tied") if self.is_tied else ALONE
        return dataclasses.replace(self, layout=layout)

    def config(self, **changes: object) -> PretrainConfig:
        """The whole run's configuration, FP32; `changes` as for `training_config`."""
        model = tiny_model_config(
            self.attention, family=self.family, tie_word_embeddings=self.is_tied, **_SIZES
        )
        settings: dict[str, Any] = {
            "train_iters": STEPS,
            "num_packs": PACKS_PER_STEP,
            "weight_decay": 0.1,
        }
        settings |= {"rates": _RATES[self.stage], **self.layout.settings, **changes}
        return dataclasses.replace(training_config(**settings), model=model)


def matrix(
    layouts: Iterable[str] | None = None,
    attentions: Sequence[str] = ATTENTIONS,
    families: Sequence[str] = FAMILIES,
    stages: Sequence[int] | None = None,
) -> list[Cell]:
    """All cells of these layouts, without attentions that one does not serve; of all layouts and in
    the stages that each is listed for where they are None."""
    named = tuple(layouts) if layouts is not None else (*LAYOUTS, *FURTHER_LAYOUTS)
    cells = [
        Cell(Layout(name), attention, family, stage)
        for name in named
        for attention, family in product(attentions, families)
        for stage in stages or ((3,) if name in FURTHER_LAYOUTS else STAGES)
    ]
    return [cell for cell in cells if cell.is_served]


def make_packs(steps: int = STEPS) -> list[PackedBatch]:
    """The packs of all steps."""
    kinds: list[tuple[list[int], list[tuple[int, ...]], bool]] = [
        ([9, 5, 8], [(3,), (), (0, 5)], False),
        ([4, 10], [(), (1, 1)], False),
        ([7], [(7,)], True),
        ([11, 6], [], False),
    ]
    return [
        make_batch(texts, images, unlabelled=unlabelled, seed=len(kinds) * step + number)
        for step in range(steps)
        for number, (texts, images, unlabelled) in enumerate(kinds)
    ]

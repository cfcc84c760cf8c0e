"""Every layout over ranks gives the losses, gradients and checkpoints of one process.

Training steps through megatron-core's own machinery: its DDP, its pipeline schedule, its
gradient finalization. The micro-batches are the awkward ones: ragged samples, one of them without
an image, a pack without images, a pack without labels.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_dattn.attention import PRESETS
from megatron_dattn.batch import PackedBatch
from megatron_dattn.models.execution import ExactSavings
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.parallel.context.shares import take_share
from megatron_dattn.training.forward_backward import finalize_gradients
from tests.support.distributed import run_distributed
from tests.support.megatron import global_parameters, init_model_parallel
from tests.support.vlm import (
    CLIP,
    VISION,
    join_shards,
    make_batch,
    partition_of,
    tiny_model,
    tiny_model_config,
)

SAVING = ExactSavings()
NAIVE = ExactSavings(
    visual_queries=False, folded_output=False, unread_tokens=False, labelled_logits=False
)
CHUNKED = ExactSavings(ffn_chunk_tokens=16)
Joined = tuple[dict[str, Tensor], dict[str, Tensor]]  # losses, whole gradients
Ranks = tuple[int, int, int, int]


# What of a case is the same in one process.
_MODEL_FIELDS = ("preset", "frozen", "tie", "family", "vision", "layers", "heads", "double")


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout and what is trained under it."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    sequence_parallel: bool = False
    preset: str = "dattn"
    recompute: str = "none"
    savings: ExactSavings = SAVING
    frozen: tuple[str, ...] = ()
    tie: bool = False
    family: str = "mistral"
    vision: str = "siglip"
    encoder: str = "data"
    """What tensor-parallel ranks share of the vision encoder."""
    layers: int = 2
    heads: tuple[int, int] | None = None
    """Query and key heads of the language model, if not its own."""
    first_stage: int | None = None
    """Layers of the first pipeline stage, if not its equal share."""
    double: bool = False
    """Whether to compute in float64, not float32."""

    @property
    def ranks(self) -> Ranks:
        """Sizes of the tensor-, pipeline-, context- and data-parallel axes."""
        return self.tensor, self.pipeline, self.context, self.data

    @property
    def alone(self) -> "Case":
        """The same training in one process, without recomputation, nothing left out."""
        return dataclasses.replace(Case(savings=NAIVE), **{
            name: getattr(self, name) for name in _MODEL_FIELDS
        })  # fmt: skip

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            num_layers_in_first_pipeline_stage=self.first_stage,
            context_parallel_size=self.context,
            sequence_parallel=self.sequence_parallel,
        )

    def __str__(self) -> str:
        fields = dataclasses.fields(self)
        changed = {f.name: getattr(self, f.name) for f in fields}
        return ",".join(
            f"{f.name}={changed[f.name]}" for f in fields if changed[f.name] != f.default
        )


@dataclasses.dataclass
class Result:
    """What one rank knows after the step."""

    losses: dict[str, Tensor]  # by first sample key; on last stages
    gradients: dict[str, tuple[Tensor, int | None, int]]  # shard, cut axis, stride
    tensor_rank: int


def _batches(preset: str) -> list[PackedBatch]:
    """With two data-parallel ranks the awkward two come last, when reductions are started."""
    grid = tiny_model_config(preset).image_grid
    return [
        make_batch([9, 5, 8], [(3,), (), (0, 5)], seed=1, grid=grid),
        make_batch([4, 10], [(), (1, 1)], seed=2, grid=grid),
        make_batch([7], [(7,)], seed=3, unlabelled=True, grid=grid),
        make_batch([11, 6], seed=4, grid=grid),
    ]


def _model(case: Case) -> DistributedDataParallel:
    names = ("num_attention_heads", "num_key_value_heads")
    model = tiny_model(
        tiny_model_config(
            case.preset,
            vision=CLIP if case.vision == "clip" else VISION,
            family=case.family,
            num_hidden_layers=case.layers,
            tie_word_embeddings=case.tie,
            **dict(zip(names, case.heads or (), strict=False)),
        ),
        parallel=case.parallel,
        recompute=case.recompute,
        savings=case.savings,
        encoder_tp_mode=case.encoder,
    )
    for name in case.frozen:
        if getattr(model, name) is not None:
            getattr(model, name).requires_grad_(False)
    if case.double:
        model.double()
        model.config.pipeline_dtype = torch.float64
    # Overlapped reduction waits for every parameter's gradient in the last backward pass.
    settings = DistributedDataParallelConfig(overlap_grad_reduce=_overlaps(case))
    model.config.finalize_model_grads_func = finalize_gradients
    ddp = DistributedDataParallel(model.config, settings, model)
    model.config.no_sync_func = ddp.no_sync
    return ddp


def _overlaps(case: Case) -> bool:
    return case.data * case.context > 1


def _train_step(case: Case) -> Result:
    ddp = _model(case)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    share = parallel_state.get_context_parallel_rank(), case.context
    mine = [
        take_share(batch, *share)
        for batch in _batches(case.preset)[parallel_state.get_data_parallel_rank() :: case.data]
    ]
    losses: dict[str, Tensor] = {}

    def loss_function(batch: PackedBatch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        losses[batch.sample_keys[0]] = output.detach().clone()
        return output.sum(), torch.tensor(output.numel(), dtype=torch.int), {}

    def forward_step(batches: Iterator[PackedBatch], model: Any) -> Any:
        batch = next(batches)
        output = model(batch if first else batch.without_pixels())
        return output, partial(loss_function, batch)

    # Overlapped, DDP learns in its first step which gradients come, and in the second relies on it.
    for batches in (mine[::-1], mine) if _overlaps(case) else (mine,):
        ddp.zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[ddp],
            num_microbatches=len(batches),
            seq_length=batches[0].layout.num_tokens * case.context,
            micro_batch_size=1,
            forward_only=False,
        )
    return Result(losses if last else {}, _gradients(ddp, case), _tensor_rank())


def _gradients(
    ddp: DistributedDataParallel, case: Case
) -> dict[str, tuple[Tensor, int | None, int]]:
    stage = parallel_state.get_pipeline_model_parallel_rank()
    offset = sum(case.parallel.layers_per_pipeline_stage(case.layers)[:stage])
    return {
        name: (param.main_grad.clone(), *partition_of(param))
        for name, param in global_parameters(ddp.module, offset)
        if param.requires_grad
    }


def _tensor_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank()


def _joined(results: Iterable[Result]) -> Joined:
    """Losses and whole gradients from all ranks; what is replicated must agree exactly."""
    losses: dict[str, Tensor] = {}
    shards: dict[str, dict[int, Tensor]] = defaultdict(dict)
    cuts: dict[str, tuple[int | None, int]] = {}
    for result in results:
        for key, loss in result.losses.items():
            torch.testing.assert_close(losses.setdefault(key, loss), loss, rtol=0, atol=0)
        for name, (shard, axis, stride) in result.gradients.items():
            known = shards[name].setdefault(result.tensor_rank, shard)
            torch.testing.assert_close(known, shard, rtol=0, atol=0, msg=name)
            cuts[name] = axis, stride
    gradients = {
        name: join_shards([parts[rank] for rank in sorted(parts)], *cuts[name])
        for name, parts in shards.items()
    }
    return losses, gradients


def _train_cases(ranks: Ranks, cases: Sequence[Case]) -> list[Result]:
    init_model_parallel(*ranks[:3])
    return [_train_step(case) for case in cases]


@cache
def results_of(ranks: Ranks, cases: tuple[Case, ...]) -> dict[Case, Joined]:
    """Losses and gradients of those of the cases, alone or not, that have this layout, from one
    start of its ranks."""
    cases = tuple(dict.fromkeys(c for case in cases for c in (case, case.alone)))
    cases = tuple(case for case in cases if case.ranks == ranks)
    by_rank = run_distributed(_train_cases, math.prod(ranks), ranks, cases, timeout=300)
    return {case: _joined(r[i] for r in by_rank) for i, case in enumerate(cases)}


OTHER_PRESETS = [name for name in PRESETS if name not in ("dattn", "s_attn")]
GEMMA2_PRESETS = ("dattn", "s_attn", "dattn_cascade", "saisa", "yopo")
CASES = [
    Case(tensor=2),
    Case(tensor=2, sequence_parallel=True),
    Case(tensor=2, sequence_parallel=True, preset="s_attn"),
    Case(tensor=2, sequence_parallel=True, recompute="full"),
    Case(tensor=2, sequence_parallel=True, recompute="selective", tie=True),
    Case(tensor=2, sequence_parallel=True, recompute="selective", preset="s_attn"),
    Case(tensor=2, sequence_parallel=True, recompute="selective", savings=CHUNKED),
    Case(pipeline=2, recompute="selective", family="gemma2", frozen=("vision_model",)),
    Case(tensor=2, sequence_parallel=True, frozen=("vision_model", "language_model")),
    # Of three images and four ranks one rank has none; the encoder's two heads are not cut.
    Case(tensor=4, sequence_parallel=True, heads=(8, 4)),
    Case(tensor=4, heads=(8, 4), vision="clip"),
    Case(tensor=4, sequence_parallel=True, heads=(8, 4), frozen=("vision_model",)),
    *(
        Case(tensor=2, sequence_parallel=True, encoder="weights", vision=v)
        for v in ("siglip", "clip")
    ),
    Case(tensor=2, encoder="weights", preset="fastervlm"),
    Case(tensor=2, data=2, sequence_parallel=True),
    Case(pipeline=2),
    Case(pipeline=2, tie=True),
    Case(pipeline=2, frozen=("vision_model", "language_model")),
    Case(data=2),
    Case(data=2, frozen=("vision_model",)),
    Case(tensor=2, pipeline=2, sequence_parallel=True, recompute="full"),
    Case(tensor=2, sequence_parallel=True, savings=NAIVE),
    Case(tensor=2, sequence_parallel=True, savings=CHUNKED),
    Case(pipeline=2, savings=CHUNKED, recompute="full"),
    Case(tensor=2, sequence_parallel=True, vision="clip"),
    Case(pipeline=2, vision="clip", recompute="full"),
    # An image is longer than Gemma-2's window here, and so are the texts.
    *(Case(tensor=2, sequence_parallel=True, preset=p, family="gemma2") for p in GEMMA2_PRESETS),
    *(
        Case(pipeline=2, preset=p, family="gemma2", tie=True, layers=3, first_stage=1)
        for p in GEMMA2_PRESETS
    ),
    Case(tensor=2, pipeline=2, sequence_parallel=True, recompute="full", family="gemma2", tie=True),
    # Every rank has a part of the gradients of Qwen3's norms, and all of those of Qwen2's biases.
    *(
        Case(tensor=2, sequence_parallel=sp, preset=preset, family=family)
        for family in ("qwen2", "qwen3")
        for sp, preset in ((False, "dattn"), (True, "dattn"), (True, "s_attn"), (True, "yopo"))
    ),
    Case(pipeline=2, recompute="selective", family="qwen2", tie=True),
    Case(pipeline=2, recompute="full", family="qwen3", tie=True),
    *(Case(tensor=2, sequence_parallel=True, preset=preset) for preset in OTHER_PRESETS),
    *(Case(pipeline=2, preset=preset, recompute="full") for preset in OTHER_PRESETS),
    # A pack without images must send a gradient, of zero, to what a preset adds.
    *(Case(data=2, preset=preset) for preset in ("dattn_tanh", "dattn_cascade", "vidi", "saisa")),
    Case(tensor=2, pipeline=2, sequence_parallel=True, preset="fastervlm"),
    Case(tensor=2, pipeline=2, sequence_parallel=True, preset="yopo", savings=CHUNKED),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_equals_one_process(case: Case) -> None:
    # fp32: the same products, summed in another order across ranks.
    assert_step_equals_one_process(case, CASES, of_losses=1e-5, of_gradients=2e-5)


def assert_step_equals_one_process(
    case: Case, cases: Sequence[Case], *, of_losses: float, of_gradients: float
) -> None:
    """Losses and gradients within shares of themselves.

    Args:
        cases: all of the module, which are run together.
    """
    losses, gradients = results_of(case.ranks, tuple(cases))[case]
    expected_losses, expected = results_of(case.alone.ranks, tuple(cases))[case.alone]
    assert losses.keys() == expected_losses.keys()
    for key, loss in expected_losses.items():
        torch.testing.assert_close(losses[key].to(loss), loss, rtol=of_losses, atol=of_losses)
    if case.tie and case.pipeline > 1:  # the last stage's copy of the embedding
        assert "language_model.output_layer.weight" in gradients
        tied = gradients.pop("language_model.output_layer.weight")
        assert torch.equal(tied, gradients["language_model.embedding.word_embeddings.weight"])
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        # A share of the parameter's largest entry: single entries may nearly cancel.
        atol = of_gradients * gradient.abs().max().item() + 5e-5 * of_gradients
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=atol, msg=name)
        assert gradient.abs().max() > 0, name


def _sharded_tensors(
    ranks: Ranks, cases: Sequence[Case]
) -> list[list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]]:
    """Per case (key, global shape, global offset, values) of everything this rank would store."""
    init_model_parallel(*ranks[:3])
    return [list(_stored(_model(case))) for case in cases]


def _stored(ddp: DistributedDataParallel) -> Iterator[tuple[str, Any, Any, Tensor]]:
    for entry in ddp.module.sharded_state_dict().values():
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            if isinstance(part, ShardedTensor):
                shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
                values = part.data.detach().reshape(shape)
                yield part.key, part.global_shape, part.global_offset, values


def _assembled(results: Iterable[Sequence[Any]]) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    for stored in results:
        for key, shape, offset, values in stored:
            target = whole.setdefault(key, torch.full(shape, torch.nan))
            places = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            target[places] = values
    return whole


def test_checkpoints_do_not_know_the_layout() -> None:
    layout = Case(tensor=2, pipeline=2, sequence_parallel=True)
    gemma2 = {"family": "gemma2", "layers": 3, "first_stage": 2}
    cases = [
        *(dataclasses.replace(layout, tie=tie) for tie in (False, True)),
        dataclasses.replace(layout, tie=True, **gemma2),
    ]
    by_rank = run_distributed(_sharded_tensors, 4, cases[0].ranks, cases)
    one_process = run_distributed(_sharded_tensors, 1, (1, 1, 1, 1), [case.alone for case in cases])
    for index in range(len(cases)):
        stored = _assembled(result[index] for result in by_rank)
        expected = _assembled(result[index] for result in one_process)
        assert stored.keys() == expected.keys()
        for key, values in expected.items():
            assert torch.equal(stored[key], values), key

"""One training step: forward and backward over the micro-batches, then the update or none.

A step whose loss or gradient is not finite anywhere updates nothing anywhere: every rank decides
by the same sums. One step in `logging.alpha_interval` carries an observer that measures how much
text attends to images; the others do nothing for it.
"""

import logging
import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_dattn.data.skipped_samples import LoaderCounters, as_counts, check_share, from_counts
from megatron_dattn.errors import shortened
from megatron_dattn.models.observer import AlphaMeter
from megatron_dattn.planner.flops import model_flops
from megatron_dattn.runtime.distributed import get_device
from megatron_dattn.training.forward_backward import (
    LossSum,
    is_loss_rank,
    mean_loss,
    measure_gradients,
    run_micro_batches,
    sum_over_world,
    update_weights,
)
from megatron_dattn.training.metrics import StepReport
from megatron_dattn.training.optimizer import current_learning_rates
from megatron_dattn.training.run import Run
from megatron_dattn.training.stream import Consumed

logger = logging.getLogger(__name__)


def train_step(run: Run) -> StepReport:
    """One step: fetch, forward, backward, agree, update or skip.

    Collective over the world. The learning-rate schedule and the sample counters advance on
    skipped steps too, so that step N always means the same rate and the same samples.

    Raises:
        UserError: on all ranks, if the loader of any rank failed, or if all of them together met
            too many samples that cannot be used.
    """
    started = time.perf_counter()
    state = run.state
    rates = current_learning_rates(state.optimizer)
    # Gradients live twice: autograd hangs them on `.grad`, DDP's hooks add them to one buffer
    # (`main_grad`) that is reduced as a whole. Clear but one, and the last step's are added again.
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()

    # All packs now: a loader that fails while pipeline stages wait for each other's activations
    # would hang.
    run.stream.load(run.num_microbatches)
    meter = meter_if_due(run)
    sums = run_micro_batches(
        state.chunks,
        run.stream,
        num_microbatches=run.num_microbatches,
        seq_length=run.seq_length,
        forward_only=False,
        observer=meter,
    )
    squared_norm = measure_gradients(state.optimizer)
    consumed = run.stream.take()
    totals = _sum_over_replicas(run, sums, consumed, squared_norm)
    check_share(totals.loaded.skipped, totals.loaded.seen, run.config.data.max_skipped_fraction)
    run.recent_samples.check(totals.loaded.skipped, totals.loaded.seen)
    # A rank that skipped alone would part from the others without a sound: with the distributed
    # optimizer its shard of every parameter would be a step old.
    if not totals.skip:
        update_weights(state.optimizer, totals.grad_norm, run.config.optimizer.clip_grad)
    state.scheduler.step(increment=1)
    _account(run, totals, consumed)
    return StepReport(
        step=state.progress.step,
        loss=totals.loss,
        grad_norm=totals.grad_norm,
        skipped=totals.skip,
        learning_rates=rates,
        samples=totals.samples,
        text_tokens=totals.text_tokens,
        visual_tokens=totals.visual_tokens,
        flops=totals.flops,
        seconds=time.perf_counter() - started,
        data_wait_seconds=totals.wait_seconds / parallel_state.get_data_parallel_world_size(),
        loaded=totals.loaded,
        alpha=None if meter is None else mean_alpha(meter),
    )


@dataclass(frozen=True)
class _Totals:
    """One step's sums over all data-parallel replicas, the same on every rank."""

    loss: float
    grad_norm: float
    samples: int
    text_tokens: int
    visual_tokens: int
    flops: float
    wait_seconds: float
    loaded: LoaderCounters
    """Samples since the stage began, with those that were skipped and what was fixed."""
    skip: bool


def _sum_over_replicas(
    run: Run, sums: LossSum, consumed: Consumed, squared_norm: Tensor
) -> _Totals:
    """The loop's one exchange of figures; by it all ranks decide alike about the update.

    What is known on the device alone comes along: here the host waits for it, once in a step.
    """
    mine: list[float] = [
        sums.num_tokens,
        consumed.num_samples,
        consumed.text_tokens,
        consumed.visual_tokens,
        _flops(run, sums, consumed),
    ]
    # All ranks of a replica hold the same packs, and several the same loss: each replica counts
    # once. What its loader counts it has once anyway.
    if not is_loss_rank():
        mine = [0.0] * len(mine)
    mine += [consumed.wait_seconds, *_loader_counts(run)]
    # Any rank may have met a non-finite gradient, so this flag is summed over all of them.
    bad_here = ~squared_norm.isfinite()
    totals = sum_over_world(sums.loss, *mine, bad_here, own=(squared_norm, sums.loss))
    loss, num_tokens, samples, text, visual, flops, wait, *counts, bad, squared, own_loss = totals
    if not math.isfinite(own_loss):
        step = run.state.progress.step + 1
        keys = shortened(str(consumed.sample_keys), 300)  # logging.sample_ledger has them all
        logger.warning("loss %s in step %d, samples %s", own_loss, step, keys)
    mean = mean_loss(loss, num_tokens)
    return _Totals(
        loss=mean,
        grad_norm=math.sqrt(squared),
        samples=int(samples),
        text_tokens=int(text),
        visual_tokens=int(visual),
        flops=flops,
        wait_seconds=wait,
        loaded=from_counts(counts),
        skip=bad > 0 or not math.isfinite(mean),
    )


def _flops(run: Run, sums: LossSum, consumed: Consumed) -> float:
    return model_flops(
        run.config.model,
        consumed.layouts,
        trained=run.trained,
        labelled_tokens=sums.num_tokens,
    ).total


def _loader_counts(run: Run) -> list[float]:
    """What became of this rank's samples; the loader's counters survive a resume."""
    loader = run.state.loader
    return as_counts(LoaderCounters() if loader is None else loader.counters())


def _account(run: Run, totals: _Totals, consumed: Consumed) -> None:
    progress = run.state.progress
    progress.step += 1
    progress.consumed_samples += totals.samples
    progress.consumed_packs += run.num_microbatches * parallel_state.get_data_parallel_world_size()
    progress.text_tokens += totals.text_tokens
    progress.visual_tokens += totals.visual_tokens
    progress.skipped_samples = totals.loaded.num_skipped
    progress.fixed_problems = sum(totals.loaded.fixed.values())
    progress.skipped_steps += totals.skip
    progress.skipped_steps_in_a_row = progress.skipped_steps_in_a_row + 1 if totals.skip else 0
    if run.ledger is not None:
        run.ledger.write(progress.step, consumed.sample_keys)


def meter_if_due(run: Run) -> AlphaMeter | None:
    """An observer of alpha_V for the step that is about to begin, if it is one to be reported."""
    interval = run.config.logging.alpha_interval
    if interval == 0 or (run.state.progress.step + 1) % interval:
        return None
    language = run.config.model.language
    heads = language.num_attention_heads // parallel_state.get_tensor_model_parallel_world_size()
    return AlphaMeter(language.num_hidden_layers, heads, get_device())


def mean_alpha(meter: AlphaMeter) -> list[list[float]]:
    """Mean alpha_V by layer and head over the step's text tokens that see an image, on every rank.

    NaN where no token sees one. Collective over the world, in one exchange: data-parallel ranks add
    up, tensor-parallel ranks bring their heads and pipeline stages their layers.
    """
    num_layers, num_heads = meter.alpha.shape
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    first = parallel_state.get_tensor_model_parallel_rank() * num_heads
    sums = torch.zeros(2, num_layers, ranks * num_heads, device=meter.alpha.device)
    sums[0, :, first : first + num_heads] = meter.alpha
    sums[1, :, first : first + num_heads] = meter.counts.unsqueeze(1)
    dist.all_reduce(sums)
    weights, tokens = sums
    return (weights / tokens).tolist()

"""`--dry-run`: what a run would be, computed from its configuration without building anything.

It prints parameters, tokens, steps, FLOPs, memory and communication, and refuses what a start here
would refuse: sizes that do not divide, and all that `checks.py` knows of packages, data, folders.
It needs no GPU and no weights. A laptop plans a big run by the environment, and by the word that
what is missing on the laptop does not matter:

    WORLD_SIZE=8 python pretrain_vlm.py --config model.yaml --config stage2.yaml --dry-run elsewhere
"""

import os
from typing import Literal

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.dataset import open_dataset
from megatron_dattn.data.epochs import records_per_epoch
from megatron_dattn.errors import ConfigError, DataError, UserError
from megatron_dattn.parallel.context.exchange import bytes_per_layer
from megatron_dattn.planner.flops import executed_flops, model_flops
from megatron_dattn.planner.memory import RESERVE_BYTES
from megatron_dattn.planner.parameters import count_parameters, rank_parameters
from megatron_dattn.runtime.launcher import read_launch
from megatron_dattn.training.checks import StartChecks
from megatron_dattn.training.run_plan import Plan, make_plan, stage_memory
from megatron_dattn.training.stages import learning_rate_of

GPU_SIZES_GB = (24, 40, 48, 80, 141)
_VALUE_BYTES = {"bf16": 2, "fp32": 4}
_GRADIENT_BYTES = 4  # gradients are accumulated and reduced in fp32


def print_plan(
    config: PretrainConfig,
    where: Literal["here", "elsewhere"] = "here",
    rank: int | None = None,
) -> None:
    """Print the dry run, once, for the ranks that a launcher started or that WORLD_SIZE names.

    Where neither is there, for the smallest world that the parallel sizes allow.

    Args:
        rank: is built besides; this machine is not checked then, as its GPUs are hidden.

    Raises:
        ConfigError: the run could not start here; or, planned for elsewhere, nowhere.
    """
    launch = read_launch()
    if launch.rank > 0:
        return
    given = os.environ.get("WORLD_SIZE") or (launch.world_size > 1 and str(launch.world_size))
    if given and not (given.isdecimal() and int(given) > 0):
        raise ConfigError(f"environment variable WORLD_SIZE is {given!r}, not a number of ranks")
    world_size = int(given) if given else config.parallel.model_parallel_size
    print(dry_run(config, world_size))
    if rank is not None:
        _print_rank(config, world_size, rank)
        return
    if not given:
        print("\nFor the plan on 8 ranks, say: set the environment variable WORLD_SIZE=8.")
    problems = start_problems(config, world_size if given else None)
    if problems:
        print("\nWould end the start on this machine")
        print("\n".join(f"  - {problem}" for problem in problems))
    if problems and where == "here":
        count = "one problem is" if len(problems) == 1 else f"{len(problems)} problems are"
        raise ConfigError(
            f"the run could not start here: {count} listed above, first: {problems[0]} (to plan "
            "for another machine: --dry-run elsewhere)"
        )


def _print_rank(config: PretrainConfig, world_size: int, rank: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before the first call of CUDA: none is needed
    from megatron_dattn.training.dry_rank import dry_rank

    print(f"\n{dry_rank(config, world_size, rank)}")


def start_problems(config: PretrainConfig, world_size: int | None) -> list[UserError]:
    """Problems that a start on this machine would meet, in the order in which it would.

    Args:
        world_size: None if it is not known.
    """
    data_parallel = None
    if world_size is not None:
        data_parallel = make_plan(config, world_size).data_parallel_size
    checks = StartChecks(config, data_parallel)
    problems = checks.on_every_host() + checks.in_shared_folders()
    return list({str(problem): problem for problem in problems}.values())


def dry_run(config: PretrainConfig, world_size: int) -> str:
    """The plan of a run on `world_size` ranks as text.

    Raises:
        ConfigError: the run could not start: sizes that do not fit each other.
    """
    plan = make_plan(config, world_size)
    sections = (
        _model_section(plan),
        _layout_section(plan),
        _data_section(plan),
        _flops_section(plan),
        _memory_section(plan),
        _communication_section(plan),
    )
    title = (
        f"dry run: {config.training.stage}, attention {config.model.attention}, "
        f"{world_size} {'rank' if world_size == 1 else 'ranks'}"
    )
    return "\n\n".join([title, *("\n".join(section) for section in sections)])


def _model_section(plan: Plan) -> list[str]:
    counts = count_parameters(plan.config.model)
    rates = plan.config.optimizer.learning_rates
    lines = ["Parameters"]
    for module, count in counts.items():
        rate = learning_rate_of(rates, module)
        fate = f"trained, peak learning rate {rate:g}" if rate > 0 else "frozen"
        lines.append(f"  {module:<16}{count:>16,}  {fate}")
    updated = sum(count for module, count in counts.items() if module in plan.trained)
    lines.append(f"  {'total':<16}{sum(counts.values()):>16,}  of these trained {updated:,}")
    return lines


def _layout_section(plan: Plan) -> list[str]:
    config, layout = plan.config, plan.layout
    parallel, training, execution = config.parallel, config.training, config.execution
    extras = [
        name.removeprefix("use_").replace("_", " ")
        for name in ("sequence_parallel", "use_distributed_optimizer", "overlap_grad_reduce")
        if getattr(parallel, name)
    ]
    tokens, per_pack = config.model.tokens_per_image, training.micro_batch_size
    return [
        "Layout",
        f"  ranks       tensor {parallel.tensor_model_parallel_size} x pipeline "
        f"{parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size} x "
        f"data {plan.data_parallel_size}" + "".join(f", {extra}" for extra in extras),
        f"  pack        {layout.visual_budget} visual + {layout.text_budget} text = "
        f"{layout.num_tokens} tokens; at most {per_pack} samples",
        f"  image       {tokens} tokens; {layout.visual_budget // tokens} fit a pack",
        f"  step        {training.global_batch_size} samples = {per_pack} per pack x "
        f"{plan.data_parallel_size} replicas x {plan.num_microbatches} micro-batches",
        f"  precision   {execution.precision}, recomputation {execution.recompute}",
    ]


def _data_section(plan: Plan) -> list[str]:
    training = plan.config.training
    counted = [_count_samples(dataset) for dataset in plan.config.data.train]
    counts = [samples for samples, _ in counted]
    lines = ["Training data"]
    for samples, words in counted:
        share = f", {100 * samples / sum(counts):.1f} %" if all(counts) else ""
        lines.append(f"  {words}{share}")
    if not counts:
        lines.append("  none named (data.train)")
    total = sum(counts)
    if counts and all(counts):
        steps = total / training.global_batch_size
        lines.append(
            f"  one epoch   {total:,} samples / {training.global_batch_size} = {steps:,.1f} steps; "
            f"train_iters {training.train_iters:,} = {training.train_iters / steps:.2f} epochs"
        )
    else:
        seen = training.train_iters * training.global_batch_size
        lines.append(
            f"  train_iters {training.train_iters:,} x {training.global_batch_size} = at most "
            f"{seen:,} samples"
        )
    return lines


def _count_samples(dataset: DatasetConfig) -> tuple[int, str]:
    """Samples of a data set in an epoch, 0 if it cannot be opened, and what to say about it."""
    try:
        records = open_dataset(dataset).num_samples
    except DataError as error:
        return 0, f"not counted: {error}"
    samples = records_per_epoch(records, dataset.weight)
    words = f"{dataset.path}: {records:,} records, weight {dataset.weight:g}"
    return samples, f"{words}: {samples:,} samples in an epoch"


def _flops_section(plan: Plan) -> list[str]:
    config, layout = plan.config, plan.layout
    packs = plan.data_parallel_size * plan.num_microbatches
    presets = list(dict.fromkeys([config.model.attention, "s_attn"]))
    counted = {
        name: model_flops(config.model, [layout], trained=plan.trained, attention=name)
        for name in presets
    }
    executed = executed_flops(
        config.model,
        [layout],
        trained=plan.trained,
        recompute=plan.config.execution.recompute,
        savings=plan.config.execution.savings,
    )
    own = counted[config.model.attention]
    lines = [
        f"FLOPs of one step: {packs} packs of {layout.num_samples} samples, each "
        f"{layout.visual_lengths[0]} visual and {layout.text_lengths[0]} text tokens",
        f"  {'':<16}" + "".join(f"{name:>14}" for name in presets),
    ]
    for part in own.parts:
        values = [_flops(counted[name].parts[part].total * packs) for name in presets]
        lines.append(f"  {part:<16}" + "".join(f"{value:>14}" for value in values))
    totals = [_flops(counted[name].total * packs) for name in presets]
    lines.append(f"  {'total':<16}" + "".join(f"{value:>14}" for value in totals))
    if len(presets) > 1:
        ratio = counted["s_attn"].total / own.total
        lines.append(f"  s_attn / {config.model.attention}: {ratio:.2f}")
    more = executed.total / own.total
    lines.append(
        f"  executed, with padding, unread queries and recomputation: {more:.2f} times that"
    )
    return lines


def _memory_section(plan: Plan) -> list[str]:
    pipeline_stages = range(plan.config.parallel.pipeline_model_parallel_size)
    memories = [stage_memory(plan, pipeline_stage) for pipeline_stage in pipeline_stages]
    heaviest = max(pipeline_stages, key=lambda pipeline_stage: memories[pipeline_stage].total)
    memory = memories[heaviest]
    where = f" (heaviest pipeline stage: {heaviest})" if len(memories) > 1 else ""
    lines = [f"Memory per rank{where}; every text token has a label"]
    for label, held in (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer state", memory.optimizer),
        ("buffers", memory.buffers),
        ("activations of the decoder", memory.decoder),
        ("activations of encoder and adapter", memory.vision),
        *((f"together, {moment}", memory.states + held) for moment, held in memory.moments.items()),
    ):
        lines.append(f"  {label:<37}{_bytes(held):>10}")
    lines.append(f"  {'most, ' + memory.worst_moment:<37}{_bytes(memory.total):>10}")
    needed = memory.total + RESERVE_BYTES
    verdicts = [f"{size} GB {'yes' if needed <= size * 10**9 else 'NO'}" for size in GPU_SIZES_GB]
    lines.append(f"  fits, with {_bytes(RESERVE_BYTES)} to spare: " + ", ".join(verdicts))
    return lines


def _communication_section(plan: Plan) -> list[str]:
    """Bytes that one rank sends, by ring algorithms."""
    lines = ["Communication, bytes sent per rank"]
    parallel = plan.config.parallel
    hidden = plan.layout_on_a_rank.num_tokens * plan.config.model.language.hidden_size
    hidden *= _VALUE_BYTES[plan.config.execution.precision]
    tensor = parallel.tensor_model_parallel_size
    if tensor > 1:
        # An all-reduce is a reduce-scatter and an all-gather. Two of them forward and two backward;
        # sequence parallelism gathers the inputs of trained weights once more.
        unit = hidden * (tensor - 1) // tensor
        again = parallel.sequence_parallel and "language_model" in plan.trained
        backward = _bytes((6 if again else 4) * unit)
        lines.append(
            f"  tensor      {_bytes(4 * unit)} forward, {backward} backward, per decoder layer "
            "and micro-batch"
        )
    if parallel.pipeline_model_parallel_size > 1:
        share = hidden // tensor if parallel.sequence_parallel else hidden
        lines.append(f"  pipeline    {_bytes(share)} each way, per boundary and micro-batch")
    if parallel.context_parallel_size > 1:
        language = plan.config.model.language
        out, back = bytes_per_layer(
            plan.layout.text_budget,
            language.num_attention_heads // tensor,
            language.head_dim,
            parallel.context_parallel_size,
        )
        lines.append(
            f"  context     {_bytes(out)} forward, {_bytes(back)} backward, per decoder "
            "layer and micro-batch, for any number of visual tokens"
        )
    if plan.num_replicas_of_weights > 1:
        lines.append(f"  data        {_bytes(_data_parallel_bytes(plan))} per step")
    if len(lines) == 1:
        lines.append("  none: one rank")
    return lines


def _data_parallel_bytes(plan: Plan) -> int:
    """Gradients reduced and, with the distributed optimizer, weights gathered; largest pipeline
    stage."""
    parallel, size = plan.config.parallel, plan.num_replicas_of_weights
    trained = max(
        sum(
            count
            for module, count in rank_parameters(
                plan.config.model, parallel, plan.config.execution, pipeline_stage
            ).items()
            if module in plan.trained
        )
        for pipeline_stage in range(parallel.pipeline_model_parallel_size)
    )
    if parallel.use_distributed_optimizer:
        per_parameter = _GRADIENT_BYTES + _VALUE_BYTES[plan.config.execution.precision]
    else:
        per_parameter = 2 * _GRADIENT_BYTES
    return trained * per_parameter * (size - 1) // size


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _flops(count: int) -> str:
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e6:.2f} MFLOP"

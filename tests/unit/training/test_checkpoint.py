"""What a Checkpointer accepts, what it restores, and how it refuses."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_dattn.runtime.cpu import enable_cpu_runtime

enable_cpu_runtime()  # before anything imports megatron-core

from megatron.core.utils import unwrap_model  # noqa: E402

from megatron_dattn.checkpoint import find_checkpoint, save_checkpoint  # noqa: E402
from megatron_dattn.config.training import CheckpointConfig  # noqa: E402
from megatron_dattn.errors import CheckpointError  # noqa: E402
from megatron_dattn.models.added_parameters import comes_with_preset, is_added  # noqa: E402
from megatron_dattn.models.execution import ExecutionConfig  # noqa: E402
from megatron_dattn.planner.memory import checkpoint_bytes  # noqa: E402
from megatron_dattn.runtime.distributed import destroy_distributed  # noqa: E402
from megatron_dattn.training.checkpoint import Checkpointer  # noqa: E402
from megatron_dattn.training.optimizer import current_learning_rates, parameter_groups  # noqa: E402
from megatron_dattn.training.state import Progress  # noqa: E402
from tests.support.checkpoint_run import MODEL_FACTS, Run, Setup, changed_facts  # noqa: E402
from tests.support.megatron import init_model_parallel  # noqa: E402
from tests.support.vlm import tiny_model_config  # noqa: E402

ALL_MODULES = ("vision_model", "adapter", "language_model")


@pytest.fixture(autouse=True, scope="module")
def one_process() -> Iterator[None]:
    init_model_parallel()
    yield
    destroy_distributed()


def trained(steps: int = 2, setup: Setup | None = None) -> Run:
    run = Run(setup or Setup())
    run.train(steps)
    return run


def fresh(setup: Setup | None = None) -> Run:
    run = Run(setup or Setup(), seed=99)
    for parameter in run.state.model.parameters():
        parameter.data.mul_(0.5)
    run.state.optimizer.reload_model_params()
    return run


def weights(run: Run, module: str = "") -> dict[str, torch.Tensor]:
    model = unwrap_model(run.state.model)
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.startswith(module)
    }


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def save_conversion(folder: Path, run: Run, modules: tuple[str, ...], **more: Any) -> Path:
    """What the converter writes: weights of some modules, nothing of a preset's, `more` facts."""
    model = unwrap_model(run.state.model)
    is_new = is_added if more.get("has_added", True) else comes_with_preset
    kept = {
        key: shard
        for key, shard in model.sharded_state_dict().items()
        if shard.key.split(".")[0] in modules and not is_new(shard.key)
    }
    facts = {"model": MODEL_FACTS, "modules": list(modules), "tokenizer": "0" * 64,
             "stage": "conversion", "step": 0, "progress": {}, **more}  # fmt: skip
    return save_checkpoint(folder, 0, {"model": kept}, facts=facts)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("distributed_optimizer", [False, True], ids=["plain", "distributed"])
def test_resume_restores_the_whole_state(
    tmp_path: Path, bf16: bool, distributed_optimizer: bool
) -> None:
    setup = Setup(bf16=bf16, distributed_optimizer=distributed_optimizer)
    run = trained(3, setup)
    run.checkpointer(tmp_path).save(run.state)
    saved = run.digests()
    expected = run.train(2)
    at_the_end = run.digests()
    other = fresh(setup)
    other.train(1)
    assert other.checkpointer(tmp_path).resume(other.state)
    assert other.digests() == saved
    assert other.train(2) == expected
    assert other.digests() == at_the_end


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rates", [(1e-3, 2e-2, 5e-3), (0.0, 2e-2, 0.0)], ids=["all", "adapter"])
def test_the_room_that_a_checkpoint_needs_is_known_before(
    tmp_path: Path, bf16: bool, rates: tuple[float, float, float]
) -> None:
    run = trained(1, Setup(bf16=bf16, rates=rates))
    run.checkpointer(tmp_path).save(run.state)
    (folder,) = tmp_path.glob("step-*")
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata.values()
    tensors = [entry for entry in metadata if isinstance(entry, TensorStorageMetadata)]
    stored = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in tensors)
    modules = zip(ALL_MODULES, rates, strict=True)
    needed = checkpoint_bytes(
        tiny_model_config(),
        ExecutionConfig(precision="bf16" if bf16 else "fp32"),
        frozenset(module for module, rate in modules if rate > 0),
    )
    assert needed <= stored < needed + 1000  # counters of steps, and whatever is no parameter


def test_resume_keeps_three_learning_rates_apart(tmp_path: Path) -> None:
    run = trained(3)
    run.checkpointer(tmp_path).save(run.state)
    other = fresh()
    other.checkpointer(tmp_path).resume(other.state)
    rates = current_learning_rates(other.state.optimizer)
    assert rates == current_learning_rates(run.state.optimizer)
    assert rates["adapter"] == pytest.approx(20 * rates["vision_model"])
    assert rates["language_model"] == pytest.approx(5 * rates["vision_model"])


def test_a_state_before_the_first_update_can_be_saved_and_resumed(tmp_path: Path) -> None:
    for distributed_optimizer in (False, True):
        setup = Setup(distributed_optimizer=distributed_optimizer)
        folder = tmp_path / str(distributed_optimizer)
        run = Run(setup)
        run.checkpointer(folder).save(run.state)
        expected = run.train(2)
        other = fresh(setup)
        assert other.checkpointer(folder).resume(other.state)
        assert other.train(2) == expected


def test_there_is_nothing_to_resume_at_first(tmp_path: Path) -> None:
    run = trained(1)
    before = run.digests()
    assert not run.checkpointer(tmp_path / "new").resume(run.state)
    assert not checkpointer_without_folder().resume(run.state)
    assert run.digests() == before
    assert not (tmp_path / "new").exists()


def checkpointer_without_folder() -> Checkpointer:
    return Checkpointer(CheckpointConfig(), model=MODEL_FACTS, tokenizer="0" * 64, stage="stage1")


def test_saving_needs_a_folder() -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.save is not set"):
        checkpointer_without_folder().save(trained(0).state)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"model": changed_facts(attention="s_attn")},
            "model.attention: this run has 's_attn', the checkpoint 'dattn'",
        ),
        (
            {"model": changed_facts(language={"vocab_size": 31})},
            "model.language.vocab_size: this run has 31, the checkpoint 64",
        ),
        ({"tokenizer": "1" * 64}, f"tokenizer: this run has '{'1' * 64}', the checkpoint '0"),
        ({"stage": "stage2"}, "stage: this run has 'stage2', the checkpoint 'stage1'"),
        (
            {"recipe": {"train_iters": 30}},
            "recipe.train_iters: this run has 30, the checkpoint 20",
        ),
    ],
)
def test_another_run_is_refused_field_by_field(
    tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    run = trained(1)
    recipe = {"recipe": {"train_iters": 20}}
    run.checkpointer(tmp_path, **recipe).save(run.state)
    other = fresh()
    before = other.digests()
    with pytest.raises(CheckpointError) as error:
        other.checkpointer(tmp_path, **(recipe | change)).resume(other.state)
    assert line in str(error.value)
    assert other.digests() == before


def test_the_last_validation_is_remembered(tmp_path: Path) -> None:
    run = trained(1)
    run.state.validation = {"step": 1, "loss": 0.5}
    run.checkpointer(tmp_path).save(run.state)
    other = fresh()
    assert other.checkpointer(tmp_path).resume(other.state)
    assert other.state.validation == {"step": 1, "loss": 0.5}


def test_what_has_no_effect_may_differ(tmp_path: Path) -> None:
    run = trained(1)
    run.checkpointer(tmp_path).save(run.state)
    other = fresh()
    language = {**MODEL_FACTS["language"], "max_position_embeddings": 77}
    facts = {"model": {**MODEL_FACTS, "language": language}}
    assert other.checkpointer(tmp_path, **facts).resume(other.state)


def test_a_field_that_is_newer_than_the_checkpoint_has_the_value_of_then(tmp_path: Path) -> None:
    run = trained(1)
    language = {name: v for name, v in MODEL_FACTS["language"].items() if name != "rope_scaling"}
    run.checkpointer(tmp_path, model={**MODEL_FACTS, "language": language}).save(run.state)
    other = fresh()
    facts = {"model": {**MODEL_FACTS, "language": {**language, "rope_scaling": None}}}
    assert other.checkpointer(tmp_path, **facts).resume(other.state)
    facts["model"]["language"]["rope_scaling"] = {"factor": 8.0}
    with pytest.raises(CheckpointError, match=r"rope_scaling\.factor: this run has 8\.0"):
        other.checkpointer(tmp_path, **facts).resume(other.state)


def test_another_schedule_is_refused(tmp_path: Path) -> None:
    run = trained(1)
    run.checkpointer(tmp_path).save(run.state)
    other = fresh()
    other.state.scheduler.use_checkpoint_opt_param_scheduler = False
    other.state.scheduler.lr_decay_steps = 33
    with pytest.raises(CheckpointError, match="another learning-rate schedule"):
        other.checkpointer(tmp_path).resume(other.state)


def test_a_checkpoint_without_the_loaders_place_does_not_start_the_data_again(
    tmp_path: Path,
) -> None:
    run = trained(1, Setup(with_loader=False))
    run.checkpointer(tmp_path).save(run.state)
    other = fresh()
    with pytest.raises(CheckpointError, match="loader's place in the data"):
        other.checkpointer(tmp_path).resume(other.state)


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    run = trained(1)
    checkpointer = run.checkpointer(tmp_path)
    checkpointer.save(run.state)
    run.train(1)
    next(run.state.model.parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"parameter \S+ is not finite"):
        checkpointer.save(run.state)
    assert find_checkpoint(tmp_path).step == 1


def test_finite_values_are_saved_though_their_sum_is_not(tmp_path: Path) -> None:
    run = trained(1)
    next(run.state.model.parameters()).data.fill_(3e38)
    run.checkpointer(tmp_path).save(run.state)
    assert find_checkpoint(tmp_path).step == 1


def test_old_checkpoints_go(tmp_path: Path) -> None:
    run = Run(Setup())
    checkpointer = run.checkpointer(tmp_path, keep_last=3)
    for _ in range(5):
        run.train(1)
        checkpointer.save(run.state)
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith("step")) == [
        "step-0000003",
        "step-0000004",
        "step-0000005",
    ]


def test_the_resume_is_reported(tmp_path: Path) -> None:
    run = Run(Setup())
    for _ in range(2):
        run.train(1)
        path = run.checkpointer(tmp_path).save(run.state)
    (path / "common.pt").write_bytes(b"")
    other = fresh()
    other.checkpointer(tmp_path).resume(other.state)
    report = json.loads((tmp_path / "resume_report.json").read_text())
    (reason,) = report.pop("passed_over")
    assert f"{path / 'common.pt'} is damaged: 0 bytes instead of" in reason
    assert report == {
        "resumed_from": str(tmp_path / "step-0000001"),
        "step": 1,
        "random_state": "restored",
        "data": "restored",
    }


@pytest.mark.parametrize("distributed_optimizer", [False, True], ids=["plain", "distributed"])
def test_a_stage_starts_from_weights_alone(tmp_path: Path, distributed_optimizer: bool) -> None:
    setup = Setup(bf16=True, distributed_optimizer=distributed_optimizer)
    run = trained(3, setup)
    run.checkpointer(tmp_path, data_sets=["captions.jsonl"]).save(run.state)
    other = fresh(setup)
    before = other.digests()
    checkpointer = other.checkpointer(tmp_path / "stage2", stage="stage2")
    checkpointer.load_weights(other.state, tmp_path)
    assert_equal(weights(other), weights(run))
    after = other.digests()
    for part in ("groups", "schedule", "random", "progress", "loader"):
        assert after[part] == before[part], part
    other.train(1)  # the masters follow: a stale one would pull the weights back
    moved = [
        (new.float() - old.float()).abs().max()
        for new, old in zip(weights(other).values(), weights(run).values(), strict=True)
    ]
    assert max(moved) < 0.01
    checkpointer.save(other.state)
    parent = find_checkpoint(tmp_path / "stage2").manifest.facts["parent"]
    assert parent == {
        "path": str(tmp_path / "step-0000003"),
        "stage": "stage1",
        "step": 3,
        "data_sets": ["captions.jsonl"],
        "sources": None,
        "parent": None,
    }


def test_a_conversion_without_adapter_starts_the_adapter_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = trained(1)
    save_conversion(tmp_path, source, ("vision_model", "language_model"))
    other = fresh()
    adapter = weights(other, "adapter")
    checkpointer = other.checkpointer(
        tmp_path / "run", model=changed_facts(attention="s_attn", adapter={"hidden_size": 3})
    )
    checkpointer.load_weights(other.state, tmp_path)
    for module in ("vision_model", "language_model"):
        assert_equal(weights(other, module), weights(source, module))
    assert_equal(weights(other, "adapter"), adapter)
    assert "NO adapter IN" in caplog.text


def test_a_conversion_leaves_what_the_preset_adds_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = trained(1)
    save_conversion(tmp_path, source, ("vision_model", "language_model"))
    other = trained(2, Setup(gates=True))  # the first step's rate is zero
    gates = {name: gate for name, gate in weights(other).items() if is_added(name)}
    assert len(gates) == 2
    assert all(gate.any() for gate in gates.values())
    other.checkpointer(tmp_path / "run").load_weights(other.state, tmp_path)
    loaded = weights(other)
    assert_equal({name: loaded[name] for name in gates}, gates)
    pretrained = weights(source, "language_model")
    assert_equal({name: loaded[name] for name in pretrained}, pretrained)
    assert "8 parameters (on this rank) that the attention preset adds" in caplog.text


def test_a_whole_model_from_elsewhere_brings_its_adapter_and_no_preset(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = trained(1)
    save_conversion(tmp_path, source, ALL_MODULES, has_added=False)
    other = trained(2, Setup(gates=True))  # the first step's rate is zero
    gates = {name: gate for name, gate in weights(other).items() if is_added(name)}
    changed = changed_facts(attention="dattn_tanh", adapter={"max_grid": 3})
    other.checkpointer(tmp_path / "run", model=changed).load_weights(other.state, tmp_path)
    loaded = weights(other)
    assert_equal({name: loaded[name] for name in gates}, gates)
    pretrained = {n: value for n, value in weights(source).items() if not comes_with_preset(n)}
    assert_equal({name: loaded[name] for name in pretrained}, pretrained)
    assert "NO adapter IN" not in caplog.text
    assert "language_model.decoder.layers.*.self_attention.gate keep their init" in caplog.text


def test_an_adapter_from_elsewhere_must_be_the_configured_one(tmp_path: Path) -> None:
    save_conversion(tmp_path, trained(1), ALL_MODULES, has_added=False)
    other = fresh()
    changed = changed_facts(adapter={"hidden_size": 3})
    with pytest.raises(CheckpointError, match=r"model\.adapter\.hidden_size"):
        other.checkpointer(tmp_path / "run", model=changed).load_weights(other.state, tmp_path)


@pytest.mark.parametrize("resume", [True, False], ids=["resume", "next stage"])
def test_a_trained_checkpoint_must_hold_what_the_preset_adds(tmp_path: Path, resume: bool) -> None:
    run = trained(1)
    run.checkpointer(tmp_path).save(run.state)
    other = fresh(Setup(gates=True))
    checkpointer = other.checkpointer(tmp_path)
    load = checkpointer.resume if resume else partial(checkpointer.load_weights, path=tmp_path)
    with pytest.raises(CheckpointError, match=r"not in the checkpoint .*self_attention\.gate"):
        load(other.state)


def test_what_the_preset_adds_is_resumed_and_handed_to_the_next_stage(tmp_path: Path) -> None:
    setup = Setup(gates=True)
    run = trained(2, setup)
    run.checkpointer(tmp_path).save(run.state)
    resumed, next_stage = fresh(setup), fresh(setup)
    assert resumed.checkpointer(tmp_path).resume(resumed.state)
    assert resumed.digests() == run.digests()
    next_stage.checkpointer(tmp_path / "run").load_weights(next_stage.state, tmp_path)
    assert_equal(weights(next_stage), weights(run))


@pytest.mark.parametrize("distributed_optimizer", [False, True], ids=["plain", "distributed"])
def test_the_adapters_rate_alone_trains_what_the_preset_adds(distributed_optimizer: bool) -> None:
    setup = Setup(gates=True, rates=(0.0, 1e-2, 0.0), distributed_optimizer=distributed_optimizer)
    run = Run(setup)
    before = weights(run)
    run.train(2)
    moved = {name for name, value in weights(run).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("adapter.") or is_added(name)}
    groups = parameter_groups(run.state.optimizer)
    assert {group.module for group in groups} == {"adapter"}
    assert sum(g.num_parameters for g in groups) == sum(before[name].numel() for name in moved)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    run = trained(1)
    run.checkpointer(tmp_path).save(run.state)
    other = fresh()
    checkpointer = other.checkpointer(
        tmp_path / "run", model=changed_facts(attention="s_attn"), tokenizer="1" * 64
    )
    with pytest.raises(CheckpointError) as error:
        checkpointer.load_weights(other.state, tmp_path)
    assert "model.attention: this run has 's_attn', the checkpoint 'dattn'" in str(error.value)
    assert "tokenizer: this run has" in str(error.value)


def test_weights_must_hold_the_backbones(tmp_path: Path) -> None:
    run = trained(1)
    save_conversion(tmp_path, run, ("vision_model",))
    other = fresh()
    with pytest.raises(CheckpointError, match="holds no weights of language_model"):
        other.checkpointer(tmp_path / "run").load_weights(other.state, tmp_path)


@pytest.mark.parametrize("name", [None, "model.safetensors"])
def test_weights_are_not_taken_from_a_folder_of_another_kind(
    tmp_path: Path, name: str | None
) -> None:
    run = fresh()
    if name:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint in|Hugging Face"):
        run.checkpointer(tmp_path / "run").load_weights(run.state, tmp_path)


def test_progress_reads_back_and_refuses_what_it_does_not_know() -> None:
    progress = Progress(step=3, consumed_samples=12, visual_tokens=99)
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
    assert Progress.from_json({"step": 3}) == Progress(step=3)
    older = {"step": 3, "visual_rows": 99}
    assert Progress.from_json(older) == Progress(step=3, visual_tokens=99)
    for wrong in ({"steps": 3}, {"step": "3"}, {"step": 1.5}, {"step": True}):
        with pytest.raises(CheckpointError, match="not understood"):
            Progress.from_json(wrong)

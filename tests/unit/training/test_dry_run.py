"""The dry run: what it prints for a run that would start, what it refuses of one that would not."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.training import (
    ModuleLearningRates,
    OptimizerConfig,
    TrainingConfig,
)
from megatron_dattn.data.config import DataConfig, DatasetConfig
from megatron_dattn.data.prepare import write_jsonl
from megatron_dattn.errors import ConfigError
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.parallel.config import ParallelConfig
from megatron_dattn.planner.flops import model_flops
from megatron_dattn.planner.memory import checkpoint_bytes
from megatron_dattn.planner.parameters import count_parameters
from megatron_dattn.training.checks import StartChecks
from megatron_dattn.training.dry_run import dry_run, print_plan
from megatron_dattn.training.run_plan import make_plan
from tests.support.vlm import even_model_config

TINY = PretrainConfig(
    model=even_model_config(),
    data=DataConfig(visual_budget=40, text_budget=24),
    training=TrainingConfig(train_iters=30, micro_batch_size=4, global_batch_size=16),
)


def changed(**sections: dict) -> PretrainConfig:
    """TINY with fields of some sections replaced."""
    replaced = {
        name: dataclasses.replace(getattr(TINY, name), **fields)
        for name, fields in sections.items()
    }
    return dataclasses.replace(TINY, **replaced)


def line_of(report: str, start: str) -> str:
    (line,) = [line for line in report.splitlines() if line.strip().startswith(start)]
    return line


def test_full_pack_holds_what_fits() -> None:
    """40 visual tokens hold two images of 16; 24 text tokens give them 12 each."""
    plan = make_plan(TINY, world_size=2)
    assert plan.layout.text_lengths == (12, 12)
    assert plan.layout.num_visual_tokens == 32
    assert (plan.data_parallel_size, plan.num_microbatches) == (2, 2)


def test_a_full_pack_holds_images_with_the_most_tiles() -> None:
    """Sixteen tokens a square, and five squares: 170 tokens hold two such images."""
    config = changed(data={"visual_budget": 170, "image_fit": "anyres"})
    plan = make_plan(config, world_size=2)
    assert plan.layout.visual_lengths == (80, 80)
    assert len(plan.layout.images) == 10
    assert "2 samples, each 80 visual and 12 text tokens" in dry_run(config, world_size=2)


def test_an_image_has_the_rows_that_the_preset_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of 16 patches: 40 tokens would hold ten images, four samples hold four."""
    config = changed(model={"attention": "fastervlm"}, data={"visual_budget": 40})
    plan = make_plan(config, world_size=2)
    assert [image.grid for image in plan.layout.images] == [(1, 4)] * 4
    report = dry_run(config, world_size=2)
    assert "4 tokens; 10 fit a pack" in line_of(report, "image")
    assert "each 4 visual and 6 text tokens" in report
    with pytest.raises(ConfigError, match="smaller than one image of 1 x 4 = 4 tokens"):
        make_plan(changed(model={"attention": "fastervlm"}, data={"visual_budget": 3}), 2)


def test_report_names_modules_steps_and_flops() -> None:
    report = dry_run(TINY, world_size=2)
    parameters = report.split("Layout")[0]
    for module, count in count_parameters(TINY.model).items():
        assert f"{count:,}" in line_of(parameters, module)
    assert "frozen" in line_of(parameters, "language_model")
    assert "peak learning rate 0.001" in line_of(parameters, "adapter")
    assert "16 samples = 4 per pack x 2 replicas x 2 micro-batches" in report
    plan = make_plan(TINY, world_size=2)
    flops = model_flops(TINY.model, [plan.layout], trained=frozenset({"adapter"})).total
    assert f"{4 * flops / 1e6:.2f} MFLOP" in report
    assert "30 x 16 = at most 480 samples" in report


def test_baseline_is_compared_once() -> None:
    assert "s_attn / dattn: 1." in dry_run(TINY, world_size=1)
    baseline = changed(model={"attention": "s_attn"})
    report = dry_run(baseline, world_size=1)
    assert "s_attn /" not in report
    assert report.count("s_attn") == 2  # the title and one column


def test_data_sets_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl([{"id": number, "conversations": []} for number in range(240)], path)
    here = DatasetConfig(path=str(path))
    report = dry_run(changed(data={"train": [here]}), world_size=1)
    assert "240 samples" in line_of(report, str(path))
    assert "240 samples / 16 = 15.0 steps; train_iters 30 = 2.00 epochs" in report
    missing = DatasetConfig(path=str(tmp_path / "other.jsonl"))
    report = dry_run(changed(data={"train": [here, missing]}), world_size=1)
    assert "does not exist" in line_of(report, "not counted")
    assert "one epoch" not in report


def test_memory_verdicts_follow_the_total() -> None:
    assert "24 GB yes" in dry_run(TINY, world_size=1)
    big = dataclasses.replace(
        TINY,
        model=ModelConfig(),
        data=DataConfig(),
        optimizer=OptimizerConfig(ModuleLearningRates(1e-6, 1e-6, 1e-6)),
    )
    verdicts = line_of(dry_run(big, world_size=1), "fits, with")
    assert "80 GB NO" in verdicts
    assert "141 GB NO" in verdicts  # 7.67 G parameters * 18 bytes = 138 GB before any activation


def test_communication_follows_the_layout() -> None:
    assert "none: one rank" in dry_run(TINY, world_size=1)
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    report = dry_run(dataclasses.replace(TINY, parallel=parallel), world_size=8)
    for axis in ("tensor", "pipeline", "data"):
        assert line_of(report.split("Communication")[1], axis)
    assert "heaviest pipeline stage: 0" in report


def test_context_parallel_ranks_share_images_and_send_text() -> None:
    reports = {}
    for visual in (64, 640):
        data = {"visual_budget": visual, "text_budget": 24}
        config = changed(data=data, parallel={"context_parallel_size": 2})
        reports[visual] = dry_run(config, world_size=4)
    assert "context 2 x data 2" in line_of(reports[64], "ranks")
    sent = [line_of(report.split("Communication")[1], "context") for report in reports.values()]
    assert sent[0] == sent[1]
    alone = dry_run(changed(data={"visual_budget": 320}), world_size=1)
    name = "activations of the decoder"
    assert line_of(reports[640], name) == line_of(alone, name)


@pytest.mark.parametrize(
    ("sections", "world_size", "words"),
    [
        ({"parallel": {"tensor_model_parallel_size": 2}}, 3, "3"),
        ({"parallel": {"tensor_model_parallel_size": 4}}, 4, "num_key_value_heads 2"),
        ({"parallel": {"pipeline_model_parallel_size": 3}}, 3, "4 layers"),
        ({"training": {"global_batch_size": 10}}, 1, "global_batch_size 10"),
        ({"data": {"visual_budget": 15}}, 1, "4 x 4 = 16 tokens"),
        (
            {
                "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
                "data": {"text_budget": 23},
            },
            2,
            "text_budget 23 is not a multiple",
        ),
        ({"parallel": {"context_parallel_size": 2}}, 3, "context_parallel_size 2 = 2 does not"),
        ({"parallel": {"context_parallel_size": 2}}, 2, "visual_budget 40 is not a multiple"),
        (
            {"parallel": {"context_parallel_size": 2}, "model": {"attention": "s_attn"}},
            2,
            "'s_attn': its visual tokens attend .* nearest preset that it serves is 'ee_mllm'",
        ),
    ],
)
def test_impossible_sizes_are_refused(sections: dict, world_size: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        dry_run(changed(**sections), world_size)
    assert "\n" not in str(caught.value)


def test_report_is_plain_text() -> None:
    report = dry_run(TINY, world_size=1)
    assert report.isascii()
    assert all(line == line.rstrip() for line in report.splitlines())


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_launcher")
def test_world_size_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two_stages = changed(parallel={"pipeline_model_parallel_size": 2})
    print_plan(two_stages, "elsewhere")
    assert "2 ranks" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "4")
    print_plan(two_stages, "elsewhere")
    assert "data 2" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    print_plan(two_stages, "elsewhere")
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("RANK")
    for wrong in ("0", "many"):
        monkeypatch.setenv("WORLD_SIZE", wrong)
        with pytest.raises(ConfigError, match=f"WORLD_SIZE is '{wrong}'"):
            print_plan(two_stages, "elsewhere")


@pytest.mark.usefixtures("no_launcher")
def test_a_rank_is_built_besides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    print_plan(changed(parallel={"pipeline_model_parallel_size": 2}), "elsewhere", rank=3)
    said = capsys.readouterr().out
    assert "4 ranks" in said
    assert "Rank 3 of 4" in said


@pytest.mark.usefixtures("no_launcher")
def test_all_that_a_start_here_would_meet_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of it matters to a plan for another machine, but it is said."""
    hopeless = changed(
        data={
            "text_budget": 32,  # such numbers of tokens as FP8 takes
            "visual_budget": 48,
            "tokenizer": "no-tokenizer",
            "train": [DatasetConfig(path="no-train.jsonl")],
            "validation": [DatasetConfig(path="no-validation.jsonl")],
        },
        training={"eval_interval": 5},
        execution={"fp8": "hybrid", "attention_backend": "flash_attn2"},
        checkpoint={"load": "no-weights", "save": f"{__file__}/run"},
        logging={"tensorboard_dir": f"{__file__}/tb", "sample_ledger": f"{__file__}/ledger"},
    )
    with pytest.raises(ConfigError, match="could not start here: 9 problems are listed") as caught:
        print_plan(hopeless)
    assert "--dry-run elsewhere" in str(caught.value)
    output = capsys.readouterr().out
    assert "Parameters" in output
    problems = output.split("Would end the start on this machine\n")[1].splitlines()
    words = (
        "Transformer Engine",
        "flash_attn2",
        "no-tokenizer",
        "no-train.jsonl",
        "no-validation.jsonl",
        "no checkpoint in no-weights",
        "checkpoint.save",
        "logging.tensorboard_dir",
        "logging.sample_ledger",
    )
    for word in words:
        assert [line for line in problems if word in line], word
    print_plan(hopeless, "elsewhere")
    assert capsys.readouterr().out == output


def test_a_disk_without_room_for_a_checkpoint_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = ModuleLearningRates(0.0, 1e-3, 1e-3)
    config = changed(
        checkpoint={"save": str(tmp_path / "a" / "run")}, optimizer={"learning_rates": rates}
    )
    trained = frozenset(["adapter", "language_model"])
    needed = checkpoint_bytes(config.model, config.execution, trained)
    for free, problems in ((needed, 0), (needed - 1, 1)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, usage=usage: usage)
        checks = StartChecks(config, 1)
        found = [problem for problem in checks.in_shared_folders() if "free there" in str(problem)]
        assert len(found) == problems
    assert f"checkpoint.save {tmp_path}/a/run: a checkpoint of this stage takes" in str(found[0])


def test_validation_without_data_is_refused_everywhere() -> None:
    with pytest.raises(ConfigError, match=r"data\.validation names no data set"):
        dry_run(changed(training={"eval_interval": 5}), 1)

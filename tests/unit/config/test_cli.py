"""The command line: merging, Megatron's spellings, and one clear line for every mistake."""

import dataclasses
from pathlib import Path

import pytest

from megatron_dattn.attention.rotary_scaling import RotaryScaling
from megatron_dattn.config.cli import load_config, parse_command_line, render_config
from megatron_dattn.config.flags import expand_short_flags
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.errors import ConfigError


def _yaml(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_no_flags_give_the_defaults() -> None:
    command = parse_command_line([])
    assert command.config == PretrainConfig()
    assert command.dry_run is None


def test_later_files_and_flags_win_and_the_rest_stays(tmp_path: Path) -> None:
    first = _yaml(
        tmp_path,
        "a.yaml",
        "training: {train_iters: 5, seed: 7}\noptimizer: {learning_rates: {adapter: 1e-3}}\n"
        "data: {train: [{path: a.json, weight: 2}]}\n",
    )
    second = _yaml(tmp_path, "b.yaml", "training: {train_iters: 9}\n")
    config = parse_command_line(
        ["--config", first, "--config", second, "--training.micro_batch_size", "2"]
    ).config
    assert config.training.train_iters == 9
    assert config.training.seed == 7
    assert config.training.micro_batch_size == 2
    assert config.optimizer.learning_rates.adapter == 1e-3
    assert config.data.train[0].path == "a.json"
    assert config.data.train[0].weight == 2.0


def test_megatron_spellings() -> None:
    line = (
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size=2 "
        "--micro-batch-size 4 --global-batch-size 8 --train-iters 3 --save out --load from "
        "--save-interval 2 --log-interval 1 --seed 5 --use-distributed-optimizer"
    )
    config = parse_command_line(line.split()).config
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.parallel.pipeline_model_parallel_size == 2
    assert config.parallel.sequence_parallel
    assert config.parallel.use_distributed_optimizer
    assert (config.training.micro_batch_size, config.training.global_batch_size) == (4, 8)
    assert (config.training.train_iters, config.training.seed) == (3, 5)
    assert (config.checkpoint.save, config.checkpoint.load) == ("out", "from")
    assert (config.checkpoint.save_interval, config.logging.log_interval) == (2, 1)


def test_boolean_flags_take_a_value_too() -> None:
    assert expand_short_flags(["--sequence-parallel", "false"]) == [
        "--parallel.sequence_parallel",
        "false",
    ]
    assert expand_short_flags(["--sequence-parallel=true"]) == ["--parallel.sequence_parallel=true"]
    assert expand_short_flags(["--sequence-parallel", "--seed", "1"]) == [
        "--parallel.sequence_parallel",
        "true",
        "--training.seed",
        "1",
    ]


def test_every_unique_leaf_field_has_a_short_spelling() -> None:
    for name in (field.name for field in dataclasses.fields(PretrainConfig().training)):
        (flag,) = expand_short_flags([f"--{name.replace('_', '-')}=x"])
        assert flag == f"--training.{name}=x"
    (flag,) = expand_short_flags(["--ffn-chunk-tokens=8"])
    assert flag == "--execution.savings.ffn_chunk_tokens=8"


def test_dry_run_flag() -> None:
    assert parse_command_line(["--dry-run"]).dry_run == "here"
    assert parse_command_line(["--dry-run", "--train-iters", "3"]).dry_run == "here"
    assert parse_command_line(["--dry-run", "elsewhere"]).dry_run == "elsewhere"
    with pytest.raises(ConfigError, match="dry-run"):
        parse_command_line(["--dry-run", "mars"])
    assert parse_command_line(["--dry-run", "--dry-run-rank", "517"]).dry_run_rank == 517
    with pytest.raises(ConfigError, match="--dry-run-rank 3 is a part of a dry run"):
        parse_command_line(["--dry-run-rank", "3"])


def test_resolved_config_reads_back(tmp_path: Path) -> None:
    config = parse_command_line(["--train-iters", "7", "--data.train", "[{path: a}]"]).config
    assert load_config(_yaml(tmp_path, "config.yaml", render_config(config))) == config


@pytest.mark.parametrize(
    ("argv", "norm"),
    [
        ([], "before"),
        (["--model.attention", "vidi"], "behind"),
        (["--model.adapter.norm", "none"], "none"),
        (["--model.adapter.norm", "both", "--model.attention", "vidi"], "both"),
        (["--model.adapter.input_norm", "false"], "none"),
        (["--input-norm=true", "--model.attention", "vidi"], "before"),
    ],
)
def test_the_adapters_norm_also_has_its_older_name(
    tmp_path: Path, argv: list[str], norm: str
) -> None:
    config = parse_command_line(argv).config
    assert config.model.adapter_norm == norm
    assert load_config(_yaml(tmp_path, "config.yaml", render_config(config))) == config


def test_a_file_with_the_older_name_of_the_adapters_norm(tmp_path: Path) -> None:
    """Of a run folder from before, with what it said of the last norm, too."""
    text = "model: {adapter: {input_norm: false, text_scale: 0.02}}\n"
    assert load_config(_yaml(tmp_path, "old.yaml", text)).model.adapter_norm == "none"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--model.adapter.norm", "behind", "--model.adapter.input_norm", "false"],
            ["adapter.norm 'behind'", "adapter.input_norm false", "'none'", "leave input_norm out"],
        ),
        (
            ["--model.adapter.visual_position", "per_patch", "--model.attention", "s_attn"],
            ["adapter.visual_position 'per_patch' has no effect", "'s_attn' (none)"],
        ),
        (["--nope", "3"], ["unrecognized", "--nope", "--help"]),
        (["--data.templat", "plain"], ["--data.templat;", "the nearest is --data.template"]),
        (["--train-iter=3"], ["--train-iter;", "the nearest is --training.train_iters"]),
        (["--dry"], ["--dry;", "the nearest is --dry-run"]),
        (["--data.train.pat", "x"], ["--data.train.pat;", "the nearest is --data.train"]),
        (["--training.nope", "3"], ["unrecognized", "--training.nope"]),
        (["--hidden-size", "8"], ["ambiguous", "--model.vision.hidden_size"]),
        (["--train-iters", "many"], ["training.train_iters", "int", "many"]),
        (["--train-iters", "0"], ["training.train_iters", "positive", "0"]),
        (["--precision", "fp64"], ["execution.precision", "bf16", "fp64"]),
        (["--attention", "nope"], ["model.attention", "nope", "dattn"]),
        (["--sequence-parallel"], ["sequence_parallel", "tensor_model_parallel_size"]),
        (["--tensor-model-parallel-size", "0"], ["tensor_model_parallel_size", "0"]),
        (["--data.train", "[{weight: 2}]"], ["data.train", "path"]),
        (["--optimizer.learning_rates.adapter", "0"], ["learning_rates", "nothing"]),
        (["--log-interval", "0"], ["logging.log_interval", "0"]),
        (["--warmup-ratio", "3"], ["optimizer.warmup_ratio", "3"]),
        (["--save-interval", "-1"], ["checkpoint.save_interval", "-1"]),
        (["--eval-interval=-1"], ["training.eval_interval", "-1"]),
        (["--model.vision.patch_size", "0"], ["vision.patch_size", "positive", "0"]),
        (["--model.language.num_key_value_heads", "0"], ["language.num_key_value_heads", "0"]),
        (["--max-grid", "0"], ["adapter.max_grid", "0"]),
        (["--attention-backend", "nope"], ["execution.attention_backend", "nope", "cpu_flash"]),
        (["--adam-beta2", "1.5"], ["optimizer.adam_beta2", "1.5"]),
        (
            ["--attention", "dattn_cascade", "--alpha-interval", "5"],
            ["logging.alpha_interval 5", "'dattn_cascade'", "no alpha_V", "set it to 0"],
        ),
        (
            ["--context-parallel-size", "2", "--alpha-interval", "5"],
            ["logging.alpha_interval 5", "context_parallel_size 2", "set it to 0"],
        ),
        (["--context-parallel-size", "0"], ["parallel.context_parallel_size", "at least 1", "0"]),
        (["--config", "missing.yaml"], ["missing.yaml", "not exist"]),
        (["--train-iters", "1:30"], ["training.train_iters", "int", "1:30"]),
        (["--adam-eps", ".nan"], ["optimizer.adam_eps", "float", ".nan"]),
        (["--training", "3"], ["training", "mapping", "3"]),
        (["--data.tokenizer", "${config_dir}/x"], ["data.tokenizer", "files only"]),
    ],
)
def test_mistakes_are_one_line_that_names_them(argv: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command_line(argv)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("section", "field", "word", "expected"),
    [
        ("logging", "progress_bar", "off", "off"),
        ("logging", "progress_bar", "on", "on"),
        ("training", "stage", "1", "1"),
        ("training", "stage", "010", "010"),
        ("training", "stage", "1e-3", "1e-3"),
        ("training", "stage", "2024-01-01", "2024-01-01"),
        ("training", "train_iters", "1e3", 1000),
        ("training", "seed", "010", 10),
        ("optimizer", "weight_decay", "1e-1", 0.1),
        ("parallel", "overlap_grad_reduce", "yes", True),
        ("parallel", "overlap_grad_reduce", "off", False),
        ("checkpoint", "save", "1:30", "1:30"),
        ("checkpoint", "save", "no", "no"),
    ],
)
def test_words_are_read_as_meant_in_files_and_on_the_command_line(
    tmp_path: Path, section: str, field: str, word: str, expected: object
) -> None:
    name = f"{section}.{field}"
    for argv in (
        ["--config", _yaml(tmp_path, "a.yaml", f"{section}: {{{field}: {word}}}\n")],
        ["--config", f"{{{section}: {{{field}: {word}}}}}"],
        [f"--{name}", word],
        [f"--{name}={word}"],
        [f"--{section}", f"{{{field}: {word}}}"],
    ):
        config = parse_command_line(argv).config
        assert getattr(getattr(config, section), field) == expected, argv
        again = load_config(_yaml(tmp_path, "config.yaml", render_config(config)))
        assert again == config


@pytest.mark.parametrize("flag", ["--data.train", "--data.train+"])
def test_data_sets_are_read_as_meant(tmp_path: Path, flag: str) -> None:
    entry = "{path: on, image_root: 007, weight: 1e-1}"
    expected = [DatasetConfig("on", "007", 0.1)]
    value = entry if flag.endswith("+") else f"[{entry}]"
    assert parse_command_line([flag, value]).config.data.train == expected
    file = _yaml(tmp_path, "a.yaml", f"data: {{train: [{entry}]}}\n")
    assert load_config(file).data.train == expected


def test_a_section_that_may_be_absent_is_read_as_meant_too(tmp_path: Path) -> None:
    scaling = (
        "{factor: 8, low_freq_factor: 1e0, high_freq_factor: 4, "
        "original_max_position_embeddings: 1e1}"
    )
    expected = RotaryScaling(8.0, 1.0, 4.0, 10)
    name = "model.language.rope_scaling"
    assert parse_command_line([f"--{name}", scaling]).config.model.language.rope_scaling == expected
    file = _yaml(tmp_path, "a.yaml", f"model: {{language: {{rope_scaling: {scaling}}}}}\n")
    assert load_config(file).model.language.rope_scaling == expected
    argv = ["--config", file, f"--{name}", "null"]
    assert parse_command_line(argv).config.model.language.rope_scaling is None


def test_a_file_may_name_its_neighbours(tmp_path: Path) -> None:
    text = (
        "data: {tokenizer: '${config_dir}/tokenizer', train: [{path: '${config_dir}/a.jsonl'}]}\n"
    )
    data = load_config(_yaml(tmp_path, "a.yaml", text)).data
    assert data.tokenizer == f"{tmp_path}/tokenizer"
    assert data.train[0].path == f"{tmp_path}/a.jsonl"


@pytest.mark.parametrize("text", ["training: {itres: 3}\n", "trainign: {seed: 3}\n", "a: [\n"])
def test_unknown_keys_and_broken_yaml_in_files(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command_line(["--config", _yaml(tmp_path, "bad.yaml", text)])
    assert "\n" not in str(caught.value)

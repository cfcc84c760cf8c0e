"""An import, a prepared data set and a run go on where they are moved to, or mounted otherwise."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_dattn.config.cli import load_config
from megatron_dattn.conversion.hf_import.run import import_checkpoint
from tests.functional.workspace import pretrain
from tests.unit.conversion.hf_models import save_language, save_vision
from tests.unit.data.builders import make_records
from tools import convert_checkpoint, generate, plot_training, prepare_data


def train(base: Path, name: str, config: Path, load: Path) -> None:
    """Three steps of a stage: model and tokenizer from one file, data from another, one log."""
    line = "--train-iters 3 --log-interval 1 --micro-batch-size 2 --global-batch-size 2"
    line += (
        " --precision fp32 --num-workers 0 --visual-budget 48 --text-budget 512 --template plain"
    )
    files = ["--config", str(config), "--config", str(base / "prepared" / "train.yaml")]
    folders = ["--load", str(load), "--save", str(base / name), "--stage", name]
    done = pretrain([*files, *line.split(), *folders])
    assert done.returncode == 0, done.stderr
    with (base / "training.log").open("a") as log:
        log.write(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An import and a prepared data set with its images inside, both moved, and the run of them."""
    first, base = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    save_vision(first / "vision")
    save_language(first / "language")
    import_checkpoint(first / "vision", first / "language", first / "import", dtype="fp32")
    rows = make_records(first / "prepared", 12)
    (first / "rows.json").write_text(json.dumps(rows))
    arguments = ["--image-root", str(first / "prepared"), "--output", str(first / "prepared")]
    assert prepare_data.main([str(first / "rows.json"), *arguments]) == 0
    for name in ("import", "prepared"):
        (first / name).rename(base / name)
    shutil.rmtree(first)
    train(base, "before", base / "import" / "config.yaml", base / "import")
    (base / "before").rename(base / "stage1")
    (base / "import").rename(base / "import-is-elsewhere")
    return base


def test_the_configurations_name_what_lies_beside_them(base: Path) -> None:
    imported = load_config(base / "import-is-elsewhere" / "config.yaml")
    assert imported.data.tokenizer == str(base / "import-is-elsewhere" / "tokenizer")
    (entry,) = load_config(base / "prepared" / "train.yaml").data.train
    assert entry.path == str(base / "prepared" / "rows.jsonl")
    assert entry.image_root == str(base / "prepared")
    assert load_config(base / "stage1" / "config.yaml").data.tokenizer == str(
        base / "stage1" / "tokenizer"
    )


def test_a_moved_run_answers_and_is_exported(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(base / "prepared" / "images" / "0.png")
    arguments = ["--checkpoint", str(base / "stage1"), "--image", image, "--max-new-tokens", "2"]
    assert generate.main(arguments) == 0, capsys.readouterr().err
    folders = ["--checkpoint", str(base / "stage1"), "--output", str(base / "export")]
    assert convert_checkpoint.main(["export", *folders]) == 0, capsys.readouterr().err
    assert (base / "export" / "tokenizer.json").is_file()


def test_the_next_stage_needs_the_moved_run_alone(base: Path) -> None:
    train(base, "stage2", base / "stage1" / "config.yaml", base / "stage1")
    curves = plot_training.read_run(base / "training.log")
    assert [(stage.name, list(stage.loss)) for stage in curves] == [
        ("before", [1, 2, 3]),
        ("stage2", [1, 2, 3]),
    ]

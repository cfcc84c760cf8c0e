"""An evaluation's numbers reach the model card, whoever wrote them, or somebody is told."""

import json
from pathlib import Path

import pytest

from examples.quickstart.evaluate import write_accuracy
from examples.quickstart.questions import CategoryScore
from megatron_dattn.conversion.hf_export.metrics import METRICS_FILE, metrics_of_run, read_metrics
from megatron_dattn.errors import DataError


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_what_the_quickstart_s_evaluation_writes(tmp_path):
    scores = {"where": CategoryScore(4, 3, 1), "how_many": CategoryScore(8, 4, 2)}
    write_accuracy(scores, tmp_path / METRICS_FILE)
    assert metrics_of_run(tmp_path) == {
        "where, accuracy": 0.75,
        "how_many, accuracy": 0.5,
        "all, accuracy": 7 / 12,
    }


def test_flat_numbers_and_nothing_else(tmp_path, caplog):
    content = {"shapes": 0.75, "asked": 8, "note": "held out", "done": True, "by": {"loss": 1.0}}
    assert read_metrics(written(tmp_path / "m.json", content)) == {"shapes": 0.75, "asked": 8}
    assert not caplog.messages


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"m\.json is not valid JSON"),
        ([1, 2], r"m\.json must hold a JSON object, found list"),
        (None, r"m\.json cannot be read: No such file"),
    ],
)
def test_a_named_file_must_be_sound(tmp_path, content, message):
    path = tmp_path / "m.json"
    if content is not None:
        written(path, content)
    with pytest.raises(DataError, match=message):
        read_metrics(path)


@pytest.mark.parametrize("content", ["{", [1, 2]])
def test_a_damaged_file_of_the_run_is_a_warning(tmp_path, caplog, content):
    path = written(tmp_path / METRICS_FILE, content)
    assert metrics_of_run(tmp_path) == {}
    (warning,) = caplog.messages
    assert f"the model card goes without {path}" in warning


def test_a_file_without_a_number_is_a_warning(tmp_path, caplog):
    path = written(tmp_path / METRICS_FILE, {"all": {"correct": 3}, "note": "none"})
    assert metrics_of_run(tmp_path) == {}
    (warning,) = caplog.messages
    assert f"{path} gives the model card no line" in warning


def test_the_run_s_file_is_of_its_newest_checkpoint_alone(tmp_path, caplog):
    written(tmp_path / METRICS_FILE, {"shapes": 0.75})
    assert metrics_of_run(tmp_path) == {"shapes": 0.75}
    assert metrics_of_run(tmp_path, is_newest=False) == {}
    (warning,) = caplog.messages
    assert "name it with --metrics" in warning
    assert metrics_of_run(tmp_path / "elsewhere") == {}

"""The made-up checkpoint can be converted, and the table says what was measured."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks import bench_conversion
from benchmarks.bench_conversion import Measured, result_table, run_watched
from benchmarks.random_checkpoint import add_adapter, write_random_checkpoint
from megatron_dattn.checkpoint import find_checkpoint
from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.conversion.hf_import.run import import_checkpoint
from megatron_dattn.errors import UserError
from tests.support.vlm import LANGUAGE, VISION

ENCODER = dataclasses.replace(VISION, feature_layer=-1)


def test_a_random_checkpoint_has_shards_that_convert(tmp_path: Path) -> None:
    made = write_random_checkpoint(
        tmp_path / "made", vision=ENCODER, language=LANGUAGE, shard_bytes=40_000
    )
    assert len(made.files) >= 4, "several of each"
    assert max(file.stat().st_size for file in made.files) < 50_000  # headers and all
    first = next(made.language.glob("model-00001-of-*.safetensors"))
    with safe_open(first, framework="pt") as file:
        weight = file.get_tensor("model.embed_tokens.weight")
    assert weight.shape == (64, 40)
    assert 0.9 < weight.float().std() < 1.1  # 2,048 normal values
    model = import_checkpoint(made.vision, made.language, tmp_path / "run")
    assert model.language == LANGUAGE
    add_adapter(tmp_path / "run", tmp_path / "trained")
    before, after = (
        open_tensors(find_checkpoint(tmp_path / name).path) for name in ("run", "trained")
    )
    assert {name.partition(".")[0] for name in after.keys() - before.keys()} == {"adapter"}
    assert all(torch.equal(before[name].load(), after[name].load()) for name in before)


def test_the_peak_of_another_process_is_seen() -> None:
    script = "import time; block = bytearray(10**8); time.sleep(2)"
    measured = run_watched(["-c", script])
    assert measured.peak_bytes is not None
    if sys.platform == "linux":
        assert 10**8 < measured.peak_bytes < 3 * 10**8
    with pytest.raises(UserError, match="ended with 3"):
        run_watched(["-c", "raise SystemExit(3)"])


def test_the_table_compares_with_the_copy_of_the_same_round() -> None:
    results = {
        "copy": [Measured(10.0), Measured(20.0)],
        "import --dry-run": [Measured(4.0, 10**9), Measured(5.0, 10**9)],
        "import": [Measured(20.0, 2 * 10**9), Measured(20.0, 3 * 10**9)],
    }
    tokens = [
        line.strip("| ").split(" | ") for line in result_table(results, 30 * 10**9).splitlines()
    ]
    assert tokens[2][:4] == ["copy", "15.0 (10.0 to 20.0)", "2.00", "1.00 (1.00 to 1.00)"]
    assert tokens[4] == ["import", "20.0 (20.0 to 20.0)", "1.50", "0.75 (0.50 to 1.00)", "3.00"]


def test_a_folder_that_exists_is_not_touched(tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").write_text("precious")
    assert bench_conversion.main(["--folder", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "precious"

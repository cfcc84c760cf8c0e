"""NaN and infinite weights are refused by name, and nothing is left; zeros from somewhere on, which
a preallocated file has that was not downloaded to its end, are warned of.
"""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dattn.checkpoint import find_checkpoint
from megatron_dattn.conversion.hf_export import run as export_hf
from megatron_dattn.conversion.hf_export.run import export_checkpoint
from megatron_dattn.conversion.hf_import.run import import_checkpoint, import_whole_model
from megatron_dattn.conversion.io.safetensors_reader import SafetensorsFolder
from megatron_dattn.conversion.io.weight_values import ZeroTensors, check_finite, is_finite
from megatron_dattn.errors import CheckpointError
from tests.support.run_folders import make_run_folder
from tests.unit.conversion.hf_models import save_language, save_vision
from tests.unit.conversion.llava_models import save_llava

DTYPES = {"BF16": torch.bfloat16, "FP16": torch.float16, "FP32": torch.float32}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_anywhere_is_found(dtype, value):
    tensor = torch.randn(7, 33).to(dtype)
    assert is_finite(tensor)
    for place in [(0, 0), (3, 17), (6, 32)]:
        damaged = tensor.clone()
        damaged[place] = value
        assert not is_finite(damaged)
    assert is_finite(tensor[:0])
    assert is_finite(torch.full((4096,), torch.finfo(dtype).max, dtype=dtype)), "sums overflow"


def test_the_message_counts_and_names():
    good, bad = torch.ones(3), torch.tensor([1.0, math.nan, math.inf, math.inf])
    with pytest.raises(CheckpointError, match=r"^here: b holds 1 NaN and 2 infinite of 4 values"):
        check_finite(torch.cat([good, bad]), [("a", good), ("b", bad)], "here")


def damage(folder: Path, name: str, value: float) -> None:
    """Set one value of a tensor, in whichever file it is."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name].view(-1)[5] = value
            save_file(tensors, file, metadata={"format": "pt"})
            return
    raise AssertionError(f"{name} is in no file")


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize(("value", "kind"), [(math.nan, "1 NaN"), (-math.inf, "1 infinite")])
def test_parts_in_shards(tmp_path, stored, value, kind):
    save_vision(tmp_path / "vision", DTYPES[stored])
    save_language(tmp_path / "language", DTYPES[stored], max_shard_size="10KB")
    assert len(list((tmp_path / "language").glob("*.safetensors"))) > 1
    damage(tmp_path / "language", UP, value)
    with pytest.raises(CheckpointError, match=rf"language: {UP} holds {kind} of \d+ values"):
        import_checkpoint(tmp_path / "vision", tmp_path / "language", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encoder_and_a_whole_model(tmp_path):
    save_vision(tmp_path / "vision")
    save_language(tmp_path / "language")
    bias = "encoder.layers.0.mlp.fc1.bias"
    names = load_file(tmp_path / "vision" / "model.safetensors")
    damage(tmp_path / "vision", next(n for n in names if n.endswith(bias)), math.nan)
    with pytest.raises(CheckpointError, match=rf"vision: {bias} holds 1 NaN"):
        import_checkpoint(tmp_path / "vision", tmp_path / "language", tmp_path / "out")
    save_llava(tmp_path / "llava")
    damage(tmp_path / "llava", "model.multi_modal_projector.linear_1.weight", math.inf)
    with pytest.raises(CheckpointError, match=r"linear_1\.weight holds 1 infinite"):
        import_whole_model(tmp_path / "llava", tmp_path / "out", dtype="fp32")


def test_a_value_that_only_fp32_can_hold(tmp_path):
    save_vision(tmp_path / "vision")
    save_language(tmp_path / "language")
    damage(tmp_path / "language", UP, 3.4e38)
    folders = (tmp_path / "vision", tmp_path / "language")
    with pytest.raises(CheckpointError, match=r"has the value 3\.4e\+38, which bfloat16 cannot"):
        import_checkpoint(*folders, tmp_path / "out")
    import_checkpoint(*folders, tmp_path / "out", dtype="fp32")
    assert find_checkpoint(tmp_path / "out") is not None


def test_what_is_not_imported_may_be_anything(tmp_path):
    """The encoder's last layer, behind the features that feed the adapter."""
    save_vision(tmp_path / "vision")
    save_language(tmp_path / "language")
    names = load_file(tmp_path / "vision" / "model.safetensors")
    damage(tmp_path / "vision", next(n for n in names if ".layers.2.mlp.fc1.bias" in n), math.nan)
    import_checkpoint(tmp_path / "vision", tmp_path / "language", tmp_path / "out")


def test_a_diverged_run_is_not_exported(tmp_path, monkeypatch):
    save_llava(tmp_path / "llava")
    import_whole_model(tmp_path / "llava", tmp_path / "run", dtype="fp32")

    def diverged(rule, tensor, pieces=export_hf._pieces):
        whole = tensor.load()
        whole.view(-1)[0] = math.nan if rule.megatron == "adapter.linear_fc2.bias" else 0.5
        return pieces(rule, _Loaded(whole))

    monkeypatch.setattr(export_hf, "_pieces", diverged)
    with pytest.raises(CheckpointError, match=r"adapter\.linear_fc2\.bias holds 1 NaN"):
        export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _Loaded:
    """A stored tensor with these values."""

    def __init__(self, values):
        self.load = lambda: values


@pytest.mark.parametrize(
    ("rows", "is_noted"),
    [((1, 1, 1, 1), False), ((1, 1, 0, 0), True), ((0, 0, 0, 0), True), ((1, 0, 0, 1), False),
     ((0, 0, 1, 0), False), ((1, 1, 1, 0), False), ((0,), True)],
)  # fmt: skip
def test_a_matrix_whose_second_half_is_zero_is_noted(rows: tuple[int, ...], is_noted: bool) -> None:
    zeros = ZeroTensors()
    zeros.add("weight", torch.tensor(rows)[:, None].expand(-1, 3).bfloat16())
    zeros.add("bias", torch.zeros(4))
    zeros.add("empty", torch.zeros(0, 3))
    assert zeros.names == (["weight"] if is_noted else [])


def test_many_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    zeros = ZeroTensors()
    zeros.warn("folder")
    assert not caplog.records
    for number in range(8):
        zeros.add(f"w{number}", torch.zeros(2, 2))
    zeros.warn("folder")
    assert "folder: w0, w1, w2, w3, w4 and 3 more are zero" in caplog.text


def test_an_import_of_half_a_file_names_its_tensors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vision, language = tmp_path / "vision", tmp_path / "language"
    save_vision(vision)
    save_language(language)
    import_checkpoint(vision, language, tmp_path / "sound")
    assert "zero" not in caplog.text
    path = language / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    tensors = SafetensorsFolder(language)
    lost = [
        n for n, shape in tensors.shapes.items() if len(shape) == 2 and not tensors.load(n).any()
    ]
    assert lost
    import_checkpoint(vision, language, tmp_path / "half")
    (record,) = [record for record in caplog.records if "zero" in record.message]
    assert record.message.startswith(str(language))
    named = record.message.partition(": ")[2].partition(" and ")[0].split(", ")
    assert set(named) <= set(tensors.shapes)
    assert "get it again" in record.message


def test_positions_that_training_has_not_moved_are_no_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They start at zero, and those behind an image's grid stay so."""
    save_vision(tmp_path / "vision")
    save_language(tmp_path / "language")
    make_run_folder(tmp_path, tmp_path / "run", "dattn")
    export_checkpoint(tmp_path / "run", tmp_path / "export")
    path = tmp_path / "export" / "model.safetensors"
    tensors = load_file(path)
    positions = [name for name in tensors if ".positions." in name]
    assert len(positions) == 2  # of rows and of columns
    zeros = {name: torch.zeros_like(tensors[name]) for name in positions}
    save_file(tensors | zeros, path, metadata={"format": "pt"})
    import_whole_model(tmp_path / "export", tmp_path / "again")
    assert "zero" not in caplog.text

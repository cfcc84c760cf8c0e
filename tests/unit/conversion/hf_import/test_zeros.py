"""Zeros from somewhere on are what a preallocated file has that was not downloaded to its end."""

from pathlib import Path

import pytest
import torch

from megatron_dattn.conversion.hf_import.run import import_checkpoint
from megatron_dattn.conversion.hf_import.zeros import ZeroTensors
from megatron_dattn.conversion.io.safetensors_reader import SafetensorsFolder
from tests.unit.conversion.hf_models import save_language, save_vision


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

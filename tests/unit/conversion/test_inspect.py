"""`inspect` counts every module of both sides, under names that can be compared."""

import re
from pathlib import Path

import pytest

from megatron_dattn.conversion.hf_export.run import export_checkpoint
from megatron_dattn.conversion.hf_import.run import import_checkpoint
from megatron_dattn.conversion.inspect import Entry, list_tensors, module_table
from tests.support.run_folders import make_run_folder
from tests.unit.conversion.hf_models import save_language, save_vision
from tests.unit.conversion.llava_models import save_llava

# One tensor of each kind that the tiny encoders hold: 32 wide, 9 patches of 8 x 8, 2 layers of 48.
LAYER = 4 * (32 * 32 + 32) + 2 * 48 * 32 + 48 + 32 + 4 * 32
PATCHES = 32 * 3 * 8 * 8
EMBEDDINGS = {"siglip": PATCHES + 32 + 9 * 32, "clip": PATCHES + 10 * 32 + 32}
ADAPTER = 48 * 32 + 48 + 48 * 48 + 48
LANGUAGE = 34_032


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Parameters and bytes by row; parts as `module/part`."""
    return parsed(module_table(list_tensors(folder)))


def parsed(table: str) -> dict[str, tuple[int, int]]:
    found, module = {}, ""
    for line in table.splitlines():
        name, parameters, num_bytes = re.fullmatch(
            r"( *\w+) +([\d,]+) parameters +([\d,]+) bytes", line
        ).groups()
        is_part = name.startswith(" ")
        module = module if is_part else name
        key = f"{module}/{name.strip()}" if is_part else name
        assert key not in found, f"two rows of {key}"
        found[key] = int(parameters.replace(",", "")), int(num_bytes.replace(",", ""))
    return found


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_an_encoder_and_its_import_are_one_module_with_equal_parts(tmp_path, family):
    save_vision(tmp_path / "vision", family=family)
    save_language(tmp_path / "language")
    theirs, text = sizes(tmp_path / "vision"), sizes(tmp_path / "language")
    import_checkpoint(tmp_path / "vision", tmp_path / "language", tmp_path / "base", dtype="bf16")
    ours = sizes(tmp_path / "base")
    embeddings = EMBEDDINGS[family]
    assert next(iter(theirs)) == "vision_model"
    assert theirs["vision_model/embeddings"] == (embeddings, 4 * embeddings)
    assert theirs["vision_model/layers"][0] == 3 * LAYER
    assert ours["vision_model/embeddings"] == (embeddings, 2 * embeddings)  # stored as BF16
    assert ours["vision_model/layers"][0] == 2 * LAYER, "the layer above the features is left out"
    norms = 2 * 32 if family == "clip" else 0
    assert ours.get("vision_model/norms", (0,))[0] == norms
    assert theirs["vision_model/norms"][0] == norms + 2 * 32
    whole = embeddings + 2 * LAYER + norms
    assert ours["vision_model"] == (whole, 2 * whole)
    assert [name for name in ours if "/" not in name] == ["vision_model", "language_model", "total"]
    assert text["language_model"] == (LANGUAGE, 4 * LANGUAGE)
    for part in ("", "/embeddings", "/layers", "/norms", "/head"):
        count, num_bytes = text[f"language_model{part}"]
        assert ours[f"language_model{part}"] == (count, num_bytes // 2), part
    assert ours["total"] == (whole + LANGUAGE, 2 * (whole + LANGUAGE))


@pytest.mark.parametrize("original_names", [True, False])
def test_a_llava_has_the_same_three_modules_whatever_its_names(tmp_path, original_names):
    save_llava(tmp_path / "llava", original_names=original_names)
    found = sizes(tmp_path / "llava")
    modules = [name for name in found if "/" not in name]
    assert modules == ["vision_model", "adapter", "language_model", "total"]
    assert found["adapter"] == (ADAPTER, 4 * ADAPTER)
    assert found["adapter/linear_1"][0] == 48 * 32 + 48
    assert found["language_model"][0] == LANGUAGE
    assert found["total"][0] == sum(found[module][0] for module in modules[:-1])


def test_a_run_and_its_export_have_equal_rows(tmp_path):
    save_vision(tmp_path / "vision", family="clip")
    save_language(tmp_path / "language")
    make_run_folder(tmp_path, tmp_path / "run", "dattn")
    export_checkpoint(tmp_path / "run", tmp_path / "model")
    ours = sizes(tmp_path / "run")
    assert sizes(tmp_path / "model") == ours
    assert {"adapter/norms", "adapter/linear_1", "adapter/linear_2", "adapter/positions"} <= set(
        ours
    )
    for module in ("vision_model", "adapter", "language_model"):
        parts = [size for name, size in ours.items() if name.startswith(f"{module}/")]
        assert ours[module] == tuple(map(sum, zip(*parts, strict=True)))


def test_modules_of_other_models_keep_their_names():
    names = ("text_model.encoder.layers.0.mlp.fc1.weight", "logit_scale", "vision_model.head.probe")
    table = parsed(module_table([Entry(name, "F32", (2, 3), 24) for name in names]))
    assert table == {
        "vision_model": (6, 24),
        "text_model": (6, 24),
        "logit_scale": (6, 24),
        "total": (18, 72),
    }

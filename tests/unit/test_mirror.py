"""Every module of some length has its tests where a reader looks for them."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_dattn"
UNIT = ROOT / "tests" / "unit"
MAX_LINES_WITHOUT = 100

# Modules that are tested with others, below tests/. Add none without need: a module that can be
# tested by itself has a file of its own, `megatron_dattn/a/b.py` that of `tests/unit/a/test_b.py`.
COVERED_BY = {
    # One oracle judges all backends of a kind.
    "attention/backends/cpu_flash": "unit/attention/backends/test_dense.py",
    "attention/backends/flash_attn2": "unit/attention/backends/test_varlen.py",
    "attention/backends/flash_attn3": "unit/attention/backends/test_varlen.py",
    "attention/presets": "unit/attention/test_config.py",
    # Rules are right if the parts made of them score every pair of the oracle once.
    "attention/plan/segments": "unit/attention/plan/test_parts.py",
    # Parts of a saved checkpoint: what each checks is seen by saving, damaging and loading one.
    "checkpoint/files": "unit/checkpoint/test_commit.py",
    "checkpoint/index_fields": "unit/checkpoint/test_mutations.py",
    "checkpoint/manifest_fields": "unit/checkpoint/test_manifest.py",
    "checkpoint/reader": "unit/checkpoint/test_load.py",
    "checkpoint/writer": "unit/checkpoint/test_commit.py",
    # All families pass the same tests.
    "conversion/families/dattn": "unit/conversion/families/test_registry.py",
    "conversion/families/decoder": "unit/conversion/families/test_registry.py",
    "conversion/families/gemma2": "unit/conversion/families/test_registry.py",
    "conversion/families/model_rules": "unit/conversion/hf_export/test_run.py",
    "conversion/families/llava": "unit/conversion/hf_import/test_vlm_source.py",
    "conversion/families/siglip": "unit/conversion/families/test_registry.py",
    "conversion/hf_export/config": "unit/conversion/hf_export/test_run.py",
    "conversion/hf_import/plan": "unit/conversion/hf_import/test_run.py",
    "conversion/hf_import/source": "unit/conversion/hf_import/test_run.py",
    "conversion/verify/imported": "unit/conversion/verify/test_verdict.py",
    "conversion/verify/imported_vlm": "unit/conversion/hf_import/test_vlm_source.py",
    "conversion/verify/parity": "distributed/test_import_layouts.py",
    # Stations of a record on its way through the loader.
    "data/config": "unit/data/test_loader.py",
    "data/dataset": "unit/data/test_loader.py",
    "data/image_settings": "unit/data/test_images.py",
    "data/prepare_targets": "unit/data/test_prepare.py",
    "data/problems": "unit/test_docs.py",
    "data/record_source": "unit/data/test_loader.py",
    "data/task_encoder": "unit/data/test_loader.py",
    "data/worker_iterator": "unit/data/test_workers.py",
    # The exported code is one model, compared with ours.
    "hf/attention_dattn": "unit/hf/test_modeling_dattn.py",
    "hf/caches_dattn": "unit/hf/test_modeling_dattn.py",
    "hf/decoder_dattn": "unit/hf/test_modeling_dattn.py",
    "hf/vision_dattn": "unit/hf/test_modeling_dattn.py",
    "inference/image_cache": "unit/inference/test_generate.py",
    "inference/prompt": "unit/inference/test_generate.py",
    # A decoder layer against a slow one, for every preset.
    "models/decomposed_attention": "unit/models/test_decoder_layer.py",
    "models/transformer_config": "unit/models/test_layer_specs.py",
    "parallel/config": "unit/training/test_dry_run.py",
    "parallel/sequence": "distributed/test_model_parallel.py",
    "planner/part_flops": "unit/planner/test_flops.py",
    # Parts of a run, on one rank and on several.
    "training/checks": "unit/training/test_dry_run.py",
    "config/training": "unit/training/test_dry_run.py",
    "training/forward_backward": "distributed/test_training.py",
    "training/run": "unit/training/test_pretrain.py",
    "training/step": "distributed/test_training.py",
    "training/state": "unit/training/test_checkpoint.py",
    "training/validate": "distributed/test_training.py",
}
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


def own_tests(module: str) -> Path:
    path = Path(module)
    return UNIT / path.parent / f"test_{path.name}.py"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_some_length_has_its_tests_in_the_mirrored_place(module: str) -> None:
    lines = len((PACKAGE / f"{module}.py").read_text(encoding="utf-8").splitlines())
    if lines > MAX_LINES_WITHOUT and module not in COVERED_BY:
        assert own_tests(module).is_file(), "or name the file that covers it, in COVERED_BY"


@pytest.mark.parametrize("module", COVERED_BY)
def test_the_list_holds_nothing_that_is_no_longer_so(module: str) -> None:
    assert module in MODULES
    assert (ROOT / "tests" / COVERED_BY[module]).is_file()
    assert not own_tests(module).exists(), "it has tests of its own: leave it out"

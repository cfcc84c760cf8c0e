"""A verdict does not depend on how much the weights enlarge rounding errors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.random_checkpoint import write_random_checkpoint
from megatron_dattn.conversion.hf_import.run import import_checkpoint
from megatron_dattn.conversion.verify.float64 import arithmetic
from megatron_dattn.conversion.verify.imported import verify_checkpoint
from megatron_dattn.conversion.verify.verdict import Comparison, Pair, judge
from megatron_dattn.models.config import LanguageConfig, VisionConfig
from tools.convert_checkpoint import main

TRUE = torch.linspace(-1, 1, 50, dtype=torch.float64).reshape(5, 10)


def run_with(ours: float, theirs: float, exact: float):
    """Both sides with these errors in FP32, and ours with another in float64."""

    def run(dtype: str) -> list[Pair]:
        if dtype == "fp64":
            return [Pair("x", TRUE + exact, TRUE)]
        return [Pair("x", TRUE + ours, TRUE + theirs)]

    return run


@pytest.mark.parametrize(
    ("ours", "theirs", "exact", "agree"),
    [
        (1e-6, 0.0, 0.5, True),  # near enough in FP32: float64 is not asked
        (0.1, 0.11, 1e-12, True),
        (0.1, 0.05, 1e-12, True),
        (0.1, 0.0, 1e-12, False),  # right in float64, but only ours rounds
        (0.1, 1e-3, 1e-12, False),
        (0.1, 0.11, 1e-3, False),  # wrong in float64
        (float("nan"), 0.1, 1e-12, False),
        (0.1, 0.11, float("nan"), False),
    ],
)
def test_float64_decides_where_fp32_differs(ours, theirs, exact, agree):
    (found,) = judge(run_with(ours, theirs, exact), "fp32")
    assert found.agrees() is agree
    assert (found.exact is None) is (abs(ours - theirs) <= 1e-4)


def test_answers_are_compared_with_float64_s_as_far_as_their_tokens_agree():
    other = TRUE.clone()
    other[2:] = 7.0  # logits behind another token

    def run(dtype: str) -> list[Pair]:
        if dtype == "fp64":
            return [Pair("x", other, other, (3, 4, 5, 6, 7))]
        return [Pair("x", TRUE + 0.1, TRUE + 0.11, (3, 9, 5, 6, 7))]

    (found,) = judge(run, "fp32")
    assert found.agrees()
    # In the two rows that know `3` at most, of 20 values.
    assert found.our_error == pytest.approx(float(0.1 * 20**0.5 / TRUE[:2].norm()))


def test_rounding_is_told_from_a_fault_of_the_same_size():
    noise = Comparison("x", 0.1, 1, exact=1e-13, our_error=0.02, their_error=0.02)
    assert noise.agrees()
    assert not replace(noise, exact=1e-6).agrees()
    assert not replace(noise, exact=None).agrees()


def test_inside_of_float64_arithmetic_nothing_is_float32():
    one = torch.ones(2)
    with arithmetic("fp64"):
        assert one.float().dtype == torch.float64
        assert one.to(torch.float32).dtype == torch.float64
        assert one.softmax(-1, dtype=torch.float32).dtype == torch.float64
        assert one.to(torch.bfloat16).dtype == torch.bfloat16
        assert one.view(torch.int32).view(torch.float32).dtype == torch.float32
    with arithmetic("fp32"):
        assert one.float().dtype == torch.float32


# Weights of variance 1: softmax chooses one key, and every layer enlarges errors some ten times.
VISION = VisionConfig("siglip", 32, 7, 2, 48, image_size=28, patch_size=14, feature_layer=-1)
LANGUAGE = LanguageConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=64,
    vocab_size=64,
)


@pytest.fixture(scope="module")
def random_import(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An import of badly conditioned models, beside their folders."""
    base = tmp_path_factory.mktemp("random")
    made = write_random_checkpoint(base, vision=VISION, language=LANGUAGE)
    import_checkpoint(made.vision, made.language, base / "run")
    return base


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_badly_conditioned_models_agree(random_import, dtype, capsys):
    """At a tolerance that neither dtype can keep there; float64 sees through the rounding."""
    words = ["verify", str(random_import / "run"), "--dtype", dtype, "--tolerance", "1e-9"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.endswith(": agree but for rounding") for line in lines)


def test_a_fault_in_a_badly_conditioned_model_is_found(random_import, tmp_path):
    """In the last bit of one BF16 weight, which in FP32 might be rounding."""
    language = tmp_path / "language"
    language.mkdir()
    for path in (random_import / "mistral").iterdir():
        (language / path.name).write_bytes(path.read_bytes())
    (file,) = language.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name].view(torch.int16)[0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    found = verify_checkpoint(random_import / "run", vision=None, language=language, tolerance=1e-9)
    verdicts = {each.what: each.agrees(1e-9) for each in found}
    assert verdicts == {
        "logits of the language model": False,
        "features of the vision encoder": True,
    }

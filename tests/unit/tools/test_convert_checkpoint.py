"""The commands of the converter, from their command line to exit status and output."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dattn.conversion import inspect as listing
from megatron_dattn.conversion.hf_export import run as export_hf
from megatron_dattn.conversion.hf_import import run as import_hf
from megatron_dattn.conversion.verify.imported import verify_checkpoint
from tests.support.passes import Passes
from tests.unit.conversion.hf_models import save_language, save_vision
from tests.unit.conversion.llava_models import save_llava
from tools.convert_checkpoint import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("hf")
    save_vision(base / "vision")
    save_language(base / "language")
    return base / "vision", base / "language"


def import_arguments(folders: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    vision, language = map(str, folders)
    inputs = ["--vision", vision, "--language", language]
    return ["import", *inputs, "--output", str(output), "--dtype", "fp32", *more]


@pytest.fixture(scope="module")
def converted(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "base"
    assert main(import_arguments(folders, output)) == 0
    return output


def test_dry_run_says_what_would_be_written_and_writes_nothing(
    folders, converted, tmp_path, capsys
):
    assert main(import_arguments(folders, tmp_path / "new", "--dry-run")) == 0
    assert not (tmp_path / "new").exists()
    said = capsys.readouterr().out
    # 64 x 48 embedding and head, two layers of 13,920, one norm.
    assert "language_model: 34,032 parameters" in said
    assert "0.00 GB as fp32" in said
    assert main(import_arguments(folders, converted, "--dry-run")) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("original", "dtype", "rounded"),
    [
        (torch.float32, "bf16", "rounded to bf16: 35 of F16, 21 of F32; --dtype fp32 keeps"),
        (torch.float16, "bf16", "rounded to bf16: 56 of F16; --dtype fp32 keeps"),
        (torch.float32, "fp32", None),
        (torch.float64, "fp32", "rounded to fp32: 21 of F64\n"),
        (torch.bfloat16, "bf16", "rounded to bf16: 35 of F16; --dtype fp32 keeps"),
    ],
)
def test_weights_that_lose_digits_are_counted(tmp_path, capsys, original, dtype, rounded):
    """Two layers of the encoder are built: 3 + 2 x 16 tensors; of the decoder 3 + 2 x 9."""
    save_vision(tmp_path / "vision", torch.float16)
    save_language(tmp_path / "language", original)
    folders = tmp_path / "vision", tmp_path / "language"
    arguments = import_arguments(folders, tmp_path / "out", "--dtype", dtype, "--dry-run")
    assert main(arguments) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if "rounded" in line]
    assert len(lines) == (rounded is not None)
    assert rounded is None or rounded in said


def test_inspect_shows_both_sides_alike(folders, converted, capsys):
    totals = []
    for folder in (folders[1], converted):
        assert main(["inspect", str(folder)]) == 0
        said = capsys.readouterr().out
        assert "F32" in said
        assert "[64, 48]" in said
        totals.append(said)
    assert "model.layers.*.mlp.gate_proj.weight" in totals[0]
    assert "language_model.decoder.layers.*.mlp.linear_fc1.weight" in totals[1]
    assert "x 2" in totals[1]
    assert "34,032 parameters" in totals[0]
    assert "34,032 parameters" in totals[1]
    assert main(["inspect", str(converted), "--every-layer"]) == 0
    assert "language_model.decoder.layers.1.mlp.linear_fc1.weight" in capsys.readouterr().out


def test_inspect_of_something_else_is_one_line(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "neither safetensors nor a checkpoint" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("tokens", [[], ["--tokens", "3", "1", "4", "1", "5"]])
def test_verify_agrees_with_the_models_that_were_converted(converted, tokens, capsys):
    assert main(["verify", str(converted), *tokens]) == 0
    said = capsys.readouterr().out
    assert said.count(": agree") == 2


def test_verify_tells_how_far_it_is(converted, tmp_path, caplog):
    caplog.set_level("INFO")
    passes = Passes()
    verify_checkpoint(converted, progress=passes)
    passes.check("checking step-0000000", "reading the checkpoint")
    steps = [line.partition(":")[0] for line in caplog.messages if " of 3:" in line]
    assert steps == ["1 of 3", "2 of 3", "3 of 3"]
    save_llava(tmp_path / "llava")
    arguments = ["import", "--model", str(tmp_path / "llava"), "--output", str(tmp_path / "base")]
    assert main(arguments) == 0
    passes = Passes()
    verify_checkpoint(tmp_path / "base", progress=passes)
    passes.check("checking step-0000000", "reading the checkpoint")


@pytest.mark.parametrize(
    ("family", "vision", "template"),
    [
        ("gemma2", "clip", "plain: a guess"),
        ("llama", "siglip", "vicuna_v1: a guess"),
        ("qwen2", "siglip", "plain: a guess"),
        ("qwen3", "clip", "plain: a guess"),
    ],
)
def test_other_families_are_imported_and_verified(tmp_path, family, vision, template, capsys):
    save_vision(tmp_path / "vision", family=vision, varied=True)
    save_language(tmp_path / "language", family=family, varied=True)
    folders = tmp_path / "vision", tmp_path / "language"
    assert main(import_arguments(folders, tmp_path / "base")) == 0
    assert f"conversations are written as {template}" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "base")]) == 0
    assert capsys.readouterr().out.count(": agree") == 2
    assert main(["inspect", str(tmp_path / "base")]) == 0


def test_mistral_s_own_files_beside_the_shards_are_left_alone(folders, tmp_path, capsys):
    """As the hub's Mistral folders have them: the same weights again, in Mistral's own format."""
    language = tmp_path / "language"
    save_language(language, max_shard_size="40KB")
    assert len(list(language.glob("model-*.safetensors"))) > 1
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, language / "consolidated.safetensors")
    for name in ("params.json", "tekken.json", "tokenizer.model.v3"):
        (language / name).write_text("{}")
    assert main(import_arguments((folders[0], language), tmp_path / "base")) == 0
    assert main(["verify", str(tmp_path / "base")]) == 0
    assert capsys.readouterr().out.count(": agree") == 2
    (language / "model.safetensors.index.json").unlink()
    assert main(import_arguments((folders[0], language), tmp_path / "other")) == 2
    assert "model.safetensors.index.json is missing" in capsys.readouterr().err
    for shard in language.glob("model-*.safetensors"):
        shard.unlink()
    assert main(import_arguments((folders[0], language), tmp_path / "other")) == 2
    assert "consolidated.safetensors, which is Mistral's own format" in capsys.readouterr().err
    assert main(["inspect", str(language)]) == 2
    assert "Mistral's own format" in capsys.readouterr().err


def test_verify_finds_one_changed_weight(folders, converted, tmp_path, capsys):
    other = tmp_path / "language"
    save_language(other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3] += 0.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert main(["verify", str(converted), "--language", str(other)]) == 1
    said = capsys.readouterr().out
    assert "logits of the language model" in said
    assert "DIFFER by more than 0.0001" in said
    assert "features of the vision encoder" in said
    assert said.count(": agree") == 1


def test_verify_refuses_ids_outside_the_vocabulary(converted, capsys):
    assert main(["verify", str(converted), "--tokens", "64"]) == 2
    assert "ids go from 0 to 63" in capsys.readouterr().err


def test_verify_in_bf16(converted):
    assert torch.finfo(torch.bfloat16).eps < 5e-2  # the tolerance is not tighter than the type
    assert main(["verify", str(converted), "--dtype", "bf16"]) == 0


def test_an_import_in_its_default_dtype_agrees_with_its_f32_originals(folders, tmp_path, capsys):
    """The checkpoint has 8 bits of each weight: Hugging Face's side must compute with the same."""
    arguments = import_arguments(folders, tmp_path / "base")
    at = arguments.index("--dtype")
    assert main([*arguments[:at], *arguments[at + 2 :]]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "base")]) == 0
    said = capsys.readouterr().out
    assert said.count("Hugging Face's weights rounded to BF16 as the checkpoint's: agree") == 2


def test_a_whole_import_in_its_default_dtype_agrees_with_its_f32_original(tmp_path, capsys):
    save_llava(tmp_path / "llava")
    arguments = ["import", "--model", str(tmp_path / "llava"), "--output", str(tmp_path / "base")]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "base")]) == 0
    said = capsys.readouterr().out
    assert said.count("Hugging Face's weights rounded to BF16 as the checkpoint's: agree") == 2


def test_verify_refuses_other_models_before_it_loads_them(folders, converted, tmp_path, capsys):
    vision, language = (Path(shutil.copytree(f, tmp_path / f.name)) for f in folders)
    save_llava(tmp_path / "llava")
    save_vision(tmp_path / "clip", family="clip")
    save_language(tmp_path / "larger", vocab_size=80)
    capsys.readouterr()
    for more, message in (
        (["--language", tmp_path / "larger"], "vocab_size: the checkpoint has 64, the folder 80"),
        (["--vision", tmp_path / "clip"], "family: the checkpoint has 'siglip', the folder 'clip'"),
        (["--model", tmp_path / "llava"], "holds no adapter"),
        (["--model", tmp_path / "llava", "--vision", vision], "--model is a whole model"),
        (["--model", tmp_path / "llava", "--language", language], "--model is a whole model"),
    ):
        assert main(["verify", str(converted), *map(str, more)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_implementation": "someone/kernel"}, "asks for code from the hub"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "brings code of its own"),
        ({"quantization_config": {"quant_method": "awq"}}, "holds a quantized model"),
    ],
)
def test_import_and_verify_run_no_code_of_a_folder(
    folders, converted, tmp_path, monkeypatch, capsys, changes, message
):
    """Nor do they ask the hub for it."""
    language = Path(shutil.copytree(folders[1], tmp_path / "language"))
    config = json.loads((language / "config.json").read_text())
    (language / "config.json").write_text(json.dumps(config | changes))
    (language / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    def refuse(*_: object, **__: object) -> None:
        (tmp_path / "asked").touch()
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    arguments = import_arguments((folders[0], language), tmp_path / "out")
    for command in (arguments, ["verify", str(converted), "--language", str(language)]):
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "asked").exists()


def test_whatever_transformers_stumbles_over_is_one_line(folders, converted, tmp_path, capsys):
    """flash-attn that is not installed is an ImportError there."""
    language = Path(shutil.copytree(folders[1], tmp_path / "language"))
    config = json.loads((language / "config.json").read_text())
    config["attn_implementation"] = "flash_attention_2"
    (language / "config.json").write_text(json.dumps(config))
    assert main(["verify", str(converted), "--language", str(language)]) == 2
    assert "cannot be loaded by transformers: " in capsys.readouterr().err.splitlines()[-1]


def test_folders_that_are_named_go_before_the_recorded_whole_model(folders, tmp_path, capsys):
    save_llava(tmp_path / "llava", "siglip", "mistral")
    arguments = ["import", "--model", str(tmp_path / "llava"), "--output", str(tmp_path / "base")]
    assert main([*arguments, "--dtype", "fp32"]) == 0
    capsys.readouterr()
    vision, language = map(str, folders)
    assert main(["verify", str(tmp_path / "base"), "--vision", vision]) == 2
    assert "give --language" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "base"), "--language", language]) == 1
    said = capsys.readouterr().out
    assert said.startswith("logits of the language model")
    assert "DIFFER" in said, "other random weights than the LLaVA's"


def test_verify_refuses_a_whole_model_of_another_size(tmp_path, capsys):
    for name, language in (("llava", "llama"), ("other", "mistral")):
        save_llava(tmp_path / name, "clip", language)
    arguments = ["import", "--model", str(tmp_path / "llava"), "--output", str(tmp_path / "base")]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "base"), "--model", str(tmp_path / "other")]) == 2
    assert "family: the checkpoint has 'llama', the folder 'mistral'" in capsys.readouterr().err


def test_a_whole_model_is_imported_inspected_and_verified(tmp_path, capsys):
    save_llava(tmp_path / "llava")
    arguments = ["import", "--model", str(tmp_path / "llava"), "--output", str(tmp_path / "base")]
    assert main([*arguments, "--dtype", "fp32", "--attention", "dattn", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "keep their initial values: adapter.positions.columns" in said
    assert main([*arguments, "--dtype", "fp32"]) == 0
    # 32 x 48 and 48 x 48 weights, two biases of 48.
    assert "adapter: 3,936 parameters" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "base")]) == 0
    assert "3,936 parameters" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "base"), "--tokens", "3", "1", "4"]) == 0
    assert capsys.readouterr().out.count(": agree") == 2
    assert main(["verify", str(tmp_path / "base"), "--tokens", "5"]) == 2
    assert "--tokens 5 is <image>" in capsys.readouterr().err
    (tmp_path / "llava").rename(tmp_path / "moved")
    assert main(["verify", str(tmp_path / "base")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "base"), "--model", str(tmp_path / "moved")]) == 0


@pytest.mark.parametrize(
    "inputs",
    [[], ["--vision", "a"], ["--language", "b"], ["--model", "c", "--vision", "a"],
     ["--model", "c", "--vision", "a", "--language", "b"]],
)  # fmt: skip
def test_import_takes_exactly_one_of_its_two_ways(inputs, tmp_path, capsys):
    assert main(["import", *inputs, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "either --vision and --language, or --model alone" in error
    assert error.count("\n") == 1


def test_export_refuses_a_folder_without_a_name_of_its_own(
    converted, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for output in (".", str(tmp_path)):
        assert main(["export", "--checkpoint", str(converted), "--output", output]) == 2
        assert "is the working directory; name a new folder" in capsys.readouterr().err


def test_export_refuses_a_damaged_file_of_metrics_first(tmp_path, capsys):
    base = tmp_path / "base"
    save_llava(tmp_path / "llava")
    assert main(["import", "--model", str(tmp_path / "llava"), "--output", str(base)]) == 0
    arguments = ["export", "--checkpoint", str(base), "--output", str(tmp_path / "out")]
    (tmp_path / "damaged.json").write_text("{")
    before = set(tmp_path.iterdir())
    for name, message in (("damaged", "is not valid JSON"), ("missing", "No such file")):
        metrics = tmp_path / f"{name}.json"
        capsys.readouterr()
        assert main([*arguments, "--metrics", str(metrics)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: metrics file {metrics}")
        assert message in error
        assert error.count("\n") == 1
    assert set(tmp_path.iterdir()) == before
    (tmp_path / "sound.json").write_text('{"all": {"accuracy": 0.5}}')
    assert main([*arguments, "--metrics", str(tmp_path / "sound.json")]) == 0
    assert "- all, accuracy: 0.5\n" in (tmp_path / "out" / "README.md").read_text()


def test_an_interrupt_is_one_line(folders, converted, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_hf, "_convert", interrupt)  # in the middle of the weights
    assert main(import_arguments(folders, tmp_path / "out")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"interrupted; {tmp_path / 'out'} was not written"
    )
    monkeypatch.setattr(export_hf, "find_run", interrupt)
    arguments = ["export", "--checkpoint", str(converted), "--output", str(tmp_path / "out")]
    assert main(arguments) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(listing, "list_tensors", interrupt)
    assert main(["inspect", str(converted)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("size", ["inf", "nan", "0", "-1"])
def test_export_needs_a_finite_shard_size(converted, tmp_path, size, capsys):
    arguments = ["export", "--checkpoint", str(converted), "--output", str(tmp_path / "out")]
    assert main([*arguments, f"--max-shard-gb={size}"]) == 2
    assert "--max-shard-gb must be positive and finite" in capsys.readouterr().err

"""A whole model comes in bitwise, computes what it computed, and answers at once."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from megatron_dattn.checkpoint import find_checkpoint
from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.conversion.families.key_names import KeyNames
from megatron_dattn.conversion.families.llava import model_from_config as llava_config
from megatron_dattn.conversion.families.llava import weight_rules
from megatron_dattn.conversion.hf_export.run import ExportOptions, export_checkpoint
from megatron_dattn.conversion.hf_import.plan import plan_whole_import
from megatron_dattn.conversion.hf_import.run import import_whole_model
from megatron_dattn.conversion.verify.imported import verify_checkpoint
from megatron_dattn.conversion.verify.imported_vlm import SEEN, TEXT, TOKENS
from megatron_dattn.errors import UserError
from megatron_dattn.inference import Prompt, generate, load_model
from megatron_dattn.inference.load import find_run, load_assets
from megatron_dattn.inference.prompt import pack_prompts
from megatron_dattn.runtime.distributed import destroy_distributed
from tests.support.run_folders import make_run_folder
from tests.unit.conversion.empty_weights import write_empty
from tests.unit.conversion.hf_models import IMAGE_SIZE, PATCH_SIZE, save_language, save_vision
from tests.unit.conversion.llava_models import IMAGE_ID, save_llava

# Encoder, language model, and whether tensors have their names from before transformers 4.52.
LLAVAS = [
    ("clip", "llama", False),
    ("clip", "llama", True),
    ("siglip", "mistral", False),
    ("siglip", "mistral", True),
]
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two images, of which one has to be cropped, or stretched."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for index, shape in enumerate([(IMAGE_SIZE, IMAGE_SIZE, 3), (33, 51, 3)]):
        pixels = np.random.default_rng(index).integers(0, 255, shape, dtype=np.uint8)
        paths.append(folder / f"{index}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture(scope="module", params=LLAVAS, ids=str)
def llava(request, tmp_path_factory):
    """A LLaVA, its folder, and the run folder that it became."""
    base = tmp_path_factory.mktemp("llava")
    vision, language, original_names = request.param
    model = save_llava(base / "hf", vision, language, original_names=original_names)
    import_whole_model(base / "hf", base / "run", dtype="fp32")
    return model, base / "hf", base / "run"


@pytest.fixture(autouse=True)
def _no_groups_are_left():
    yield
    destroy_distributed()


@pytest.fixture
def loaded(llava):
    return load_model(llava[2])


def both_logits(loaded, model, prompt):
    """Ours and Hugging Face's at every text token, [text tokens, vocabulary]."""
    batch = pack_prompts(loaded, [(prompt, [])])
    batch.pixel_values = batch.pixel_values.to(next(loaded.model.parameters()).dtype)
    rows = torch.arange(batch.layout.visual_budget, batch.layout.num_tokens)
    ids, text = [], prompt.tokens.input_ids
    for place in range(len(text) + 1):
        ids += [IMAGE_ID] * PATCHES * prompt.tokens.image_offsets.count(place)
        ids += text[place : place + 1]
    ids = torch.tensor([ids])
    pixels = {"pixel_values": batch.pixel_values} if prompt.images else {}
    with torch.inference_mode():
        theirs = model(input_ids=ids, **pixels).logits[0][ids[0] != IMAGE_ID]
        return loaded.model.forward_logits(batch, rows), theirs


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_logits_are_llava_s(llava, loaded, pictures, num_images):
    prompt = Prompt.from_question(loaded, "what is it?", pictures[:num_images])
    ours, theirs = both_logits(loaded, llava[0], prompt)
    # fp32 sums in another order, through encoder, adapter and decoder; logits of the order of 1.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_logits_are_llava_s_in_float64(llava, loaded, pictures, monkeypatch):
    """Theirs takes norms and softmax in fp32 whatever the dtype; here it is made to follow it."""

    def norm(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    softmax = torch.softmax
    for module in (modeling_llama.LlamaRMSNorm, modeling_mistral.MistralRMSNorm):
        monkeypatch.setattr(module, "forward", norm)
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    loaded.model.double()
    prompt = Prompt.from_question(loaded, "what is it?", pictures)
    model = LlavaForConditionalGeneration.from_pretrained(llava[1], attn_implementation="eager")
    ours, theirs = both_logits(loaded, model.double(), prompt)
    # Some thousand float64 roundings.
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_pixels_are_those_of_llava_s_processor(llava, loaded, pictures):
    prompt = Prompt.from_question(loaded, "what is it?", pictures)
    processor = AutoImageProcessor.from_pretrained(llava[1], backend="pil")
    images = [Image.open(path) for path in pictures]
    theirs = processor(images=images, return_tensors="pt")["pixel_values"]
    ours = loaded.preprocessor.normalise(list(prompt.images))
    # Both start from the same bytes; one rounding of float32 per step may differ.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_run_folder_answers_at_once(llava, loaded, pictures, caplog):
    prompt = Prompt.from_question(loaded, "what is it?", pictures[:1])
    assert len(generate(loaded, [prompt], max_new_tokens=3)) == 1
    is_mistral = loaded.config.model.language.family == "mistral"
    assert loaded.config.data.template == ("mistral_v3" if is_mistral else "vicuna_v1")
    assert loaded.config.model.attention == "s_attn"
    manifest = find_run(llava[2])[0].manifest
    assert manifest.modules == ("vision_model", "adapter", "language_model")


def test_another_preset_starts_from_llava_s_weights(llava, tmp_path, caplog):
    _, folder, run = llava
    plan = plan_whole_import(folder, tmp_path / "run", attention="dattn_tanh", dtype="fp32")
    gates = [f"language_model.decoder.layers.{n}.self_attention.gate" for n in range(2)]
    positions = ["adapter.positions.columns", "adapter.positions.rows"]
    assert list(plan.initial) == positions + gates
    assert f"keep their initial values: {', '.join(positions + gates)}" in plan.summary()
    import_whole_model(folder, tmp_path / "run", attention="dattn_tanh", dtype="fp32")
    plain, other = (open_tensors(find_checkpoint(path).path) for path in (run, tmp_path / "run"))
    assert plain.keys() == other.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor.load(), other[name].load())
    loaded = load_model(tmp_path / "run")
    assert not loaded.model.adapter.positions.rows.any()
    (warning,) = (message for message in caplog.messages if "holds no" in message)
    assert all(name in warning for name in positions + gates)


def test_an_import_from_elsewhere_may_be_run_with_any_preset_but_as_no_other_model(llava, tmp_path):
    run = shutil.copytree(llava[2], tmp_path / "run")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["attention"] = "dattn"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert find_run(run)[1].model.attention == "dattn"
    settings["model"]["language"]["rope_theta"] = 77.0
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=r"rope_theta: this run has 77\.0, the checkpoint 1000\.0"):
        find_run(run)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("exports")
    save_vision(base / "vision")
    save_language(base / "language")
    return base


def stored(run):
    return {name: tensor.load() for name, tensor in open_tensors(find_checkpoint(run).path).items()}


@pytest.mark.parametrize(
    ("preset", "adapter"),
    [
        ("dattn", {}),
        ("dattn_tanh", {"max_grid": 5, "norm": "both", "visual_position": "per_patch"}),
        ("vidi", {"hidden_size": 24, "norm": "none", "num_places": 7}),
        ("vidi", {}),
        ("ee_mllm", {}),
        ("dattn_cascade", {}),
        ("saisa", {}),
        ("s_attn", {"norm": "none"}),
    ],
)
def test_an_export_comes_back_bitwise(base, tmp_path, preset, adapter, caplog):
    run = tmp_path / "run"
    make_run_folder(base, run, preset, **adapter)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["image_fit"] = {"dattn": "pad", "ee_mllm": "crop"}.get(preset, "resize")
    settings["data"]["template"] = "plain" if preset == "dattn" else "mistral_v3"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    export_checkpoint(run, tmp_path / "hf", ExportOptions(max_shard_bytes=100_000))
    config = import_whole_model(tmp_path / "hf", tmp_path / "again", dtype="fp32")
    before, after = stored(run), stored(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    original, imported = (find_run(folder)[1] for folder in (run, tmp_path / "again"))
    if preset == "s_attn":  # LLaVA's format keeps no layers above the features'
        vision = replace(original.model.vision, num_hidden_layers=2, feature_layer=-1)
        assert config == replace(original.model, vision=vision, adapter=config.adapter)
    else:
        assert config == original.model
        assert imported.data.image_fit == original.data.image_fit
    assert imported.model == config
    assert imported.data.template == original.data.template
    loaded = load_model(tmp_path / "again")
    assert "initial values" not in caplog.text
    assert loaded.preprocessor == load_assets(run, original).preprocessor
    assert loaded.tokenizer.get_vocab()["<image>"] == IMAGE_ID


@pytest.mark.parametrize(
    ("language", "vision"),
    [("gemma2", "clip"), ("llama", "siglip"), ("qwen2", "clip"), ("qwen3", "siglip")],
)
def test_exports_of_other_families_come_back_bitwise(tmp_path, language, vision):
    save_vision(tmp_path / "vision", family=vision)
    save_language(tmp_path / "language", family=language)
    make_run_folder(tmp_path, tmp_path / "run", "dattn")
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    config = import_whole_model(tmp_path / "hf", tmp_path / "again", dtype="fp32")
    assert (config.language.family, config.vision.family) == (language, vision)
    assert config == find_run(tmp_path / "run")[1].model
    before, after = stored(tmp_path / "run"), stored(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_tied_model_that_stores_its_head_again_comes_in(tmp_path):
    base = tmp_path
    save_vision(base / "vision")
    save_language(base / "language", tie_word_embeddings=True)
    make_run_folder(base, base / "run", "dattn")
    export_checkpoint(base / "run", base / "hf")
    tensors = load_file(base / "hf" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    head = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, base / "hf" / "model.safetensors")
    plan_whole_import(base / "hf", base / "out")
    save_file({**tensors, "lm_head.weight": -head}, base / "hf" / "model.safetensors")
    with pytest.raises(UserError, match="with different values"):
        plan_whole_import(base / "hf", base / "out")


def test_an_export_keeps_its_preset(base, tmp_path):
    make_run_folder(base, tmp_path / "run", "dattn")
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    with pytest.raises(UserError, match=r"'s_attn' was asked for, but .* trained with 'dattn'"):
        import_whole_model(tmp_path / "hf", tmp_path / "out", attention="s_attn")
    edit(tmp_path / "hf", "config.json", t2v_scope="following")
    with pytest.raises(UserError, match="no attention preset has the model's axes"):
        import_whole_model(tmp_path / "hf", tmp_path / "out")
    edit(tmp_path / "hf", "config.json", adapter_max_grid="64", t2v_scope="all")
    with pytest.raises(UserError, match='has adapter_max_grid "64", but it must be a whole number'):
        import_whole_model(tmp_path / "hf", tmp_path / "out")
    edit(tmp_path / "hf", "config.json", v2v="causal", adapter_max_grid=64)
    with pytest.raises(UserError, match="not that of an export: v2v='causal'"):
        import_whole_model(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_of_before_says_by_its_older_name_where_its_norm_stands(base, tmp_path):
    make_run_folder(base, tmp_path / "run", "dattn", norm="none")
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("adapter_norm") == "none"
    path.write_text(json.dumps({**config, "adapter_input_norm": False}))
    assert import_whole_model(tmp_path / "hf", tmp_path / "out").adapter.norm == "none"


def edit(folder, file, **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_text(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    edit(folder, "config.json", text_config=config["text_config"] | changes)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def index_without(folder, name):
    """Split the weights' names over an index that lacks one of them."""
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    listed = {key: "model-1.safetensors" for key in names if key != name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def drop(folder, name):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    save_file(tensors, folder / "model.safetensors")


def add_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{number}>" for number in range(64)])
    tokenizer.save_pretrained(folder)


PROJECTOR = "model.multi_modal_projector.linear_1.bias"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model\.safetensors is damaged or truncated"),
        (lambda f: index_without(f, PROJECTOR), rf"index\.json does not list {PROJECTOR}"),
        (lambda f: drop(f, PROJECTOR), rf"missing {PROJECTOR} \[48\]"),
        (lambda f: edit(f, "config.json", model_type="llava_next"), "'llava_next'; --model takes"),
        (lambda f: edit_text(f, model_type="gemma2"), "language model of type 'gemma2'"),
        (lambda f: edit_text(f, model_type="phi3"), "'phi3'; supported: gemma2, llama"),
        (lambda f: edit_text(f, vocab_size=80), r"embed_tokens.weight has shape \[64, 48\]"),
        (add_tokens, "has ids up to .* vocab_size is 64"),
        (lambda f: edit(f, "config.json", image_token_index="5"), 'has image_token_index "5"'),
        (lambda f: edit(f, "config.json", image_token_index=7), "id 7, in the tokenizer it is 5"),
        (lambda f: edit(f, "config.json", vision_feature_layer=[1, 2]), r"vision_feature_layer \["),
        (lambda f: edit(f, "preprocessor_config.json", do_center_crop=False), "image_size is 28"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor_config.json is miss"),
        (lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer\.json"),
    ],
)
def test_wrong_input_is_one_error_and_leaves_nothing(tmp_path, damage, message):
    folder = tmp_path / "llava"
    save_llava(folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        import_whole_model(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_presets_without_an_adapter_cannot_take_llava_s(tmp_path):
    save_llava(tmp_path / "llava")
    for preset, message in (("saisa", "no adapter"), ("nothing", "unknown attention preset")):
        with pytest.raises(UserError, match=message):
            import_whole_model(tmp_path / "llava", tmp_path / "out", attention=preset)


@pytest.mark.parametrize("attention", [None, "dattn"])
def test_verify_compares_with_llava(llava, tmp_path, attention):
    _, folder, run = llava
    if attention is not None:
        run = tmp_path / "run"
        import_whole_model(folder, run, attention=attention, dtype="fp32")
    found = {comparison.what: comparison.largest for comparison in verify_checkpoint(run)}
    assert found.keys() == {TEXT, SEEN if attention is None else TOKENS}
    assert max(found.values()) < 1e-4  # fp32 sums in another order


@pytest.mark.parametrize("preset", ["dattn_tanh", "vidi"])
def test_verify_compares_with_an_export(base, tmp_path, preset):
    make_run_folder(base, tmp_path / "run", preset)
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    import_whole_model(tmp_path / "hf", tmp_path / "again", dtype="fp32")
    found = {what.what: what.largest for what in verify_checkpoint(tmp_path / "again")}
    assert found.keys() == {TEXT, SEEN}
    assert max(found.values()) < 1e-4
    name = "model.multi_modal_projector.linear_1.weight"
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    found = {what.what: what.largest for what in verify_checkpoint(tmp_path / "again")}
    assert found[TEXT] < 1e-4 < found[SEEN]


def test_the_published_llava_is_planned_from_headers_alone(tmp_path, monkeypatch):
    """Its config.json leaves most fields to the classes' defaults."""
    folder = tmp_path / "llava"
    save_llava(folder)
    config = {
        "model_type": "llava",
        "image_token_index": IMAGE_ID,  # the tiny tokenizer's
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    side = {"height": 336, "width": 336}
    edit(folder, "preprocessor_config.json", size={"shortest_edge": 336}, crop_size=side)
    names = KeyNames(nested=False, vision_module="vision_tower.vision_model.")
    by_module = weight_rules(llava_config(config), names)
    write_empty(folder, [rule for rules in by_module.values() for rule in rules])
    usage = shutil.disk_usage(tmp_path)._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    plan = plan_whole_import(folder, tmp_path / "out")
    # By hand: LLaVA-1.5-7B without CLIP's last layer and its last norm.
    assert plan.num_parameters == {
        "vision_model": 290_909_184,
        "adapter": 20_979_712,
        "language_model": 6_738_939_904,
    }

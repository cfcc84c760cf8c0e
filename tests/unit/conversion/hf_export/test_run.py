"""An export holds exactly the run's weights, says what it is, and exists wholly or not at all."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from megatron_dattn.conversion.hf_export import config as hf_config
from megatron_dattn.conversion.hf_export import run as export_hf
from megatron_dattn.conversion.hf_export.run import ExportOptions, export_checkpoint
from megatron_dattn.conversion.hf_import.chat_template import choose_template
from megatron_dattn.conversion.io.safetensors_reader import SafetensorsFolder
from megatron_dattn.conversion.io.tokenizer_files import chat_template
from megatron_dattn.data.conversation import Conversation, Turn
from megatron_dattn.data.template import ConversationTokenizer
from megatron_dattn.data.tokenizer import load_tokenizer
from megatron_dattn.errors import CheckpointError
from megatron_dattn.inference import Prompt, generate_tokens, load_model
from megatron_dattn.inference.prompt import pack_prompts
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.runtime.distributed import destroy_distributed
from tests.support.run_folders import make_run_folder
from tests.unit.conversion.hf_models import save_language, save_vision
from tools.convert_checkpoint import main

ROOT = Path(__file__).parents[4]
IMAGE_ID = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("export")
    save_vision(base / "vision")
    save_language(base / "language")
    make_run_folder(base, base / "dattn", "dattn")
    (base / "dattn" / "accuracy.json").write_text('{"shapes": 0.75, "note": "held out"}')
    return base


@pytest.fixture(scope="module")
def exported(base):
    options = ExportOptions(max_shard_bytes=100_000, license_name="apache-2.0")
    export_checkpoint(base / "dattn", base / "out", options)
    return base / "out"


def test_imported_tensors_come_back_bitwise(base, exported):
    ours = SafetensorsFolder(exported)
    names = set(ours.shapes)
    for folder, prefix in (("vision", "model.vision_tower."), ("language", "")):
        for name, original in load_file(base / folder / "model.safetensors").items():
            name = name.removeprefix("vision_model.")
            full = prefix + name
            if folder == "language" and name.startswith("model."):
                full = name.replace("model.", "model.language_model.", 1)
            if full in names:
                assert torch.equal(ours.load(full), original), full
                names.remove(full)
            else:  # what features of the last layer but one never touch
                assert name.startswith(("encoder.layers.2.", "post_layernorm.", "head.")), name
    assert names, "the adapter is there, too"
    assert all(name.startswith("model.multi_modal_projector.") for name in names)


def test_shards_keep_to_the_limit_and_the_index(exported):
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    shards = sorted(exported.glob("model-*.safetensors"))
    assert len(shards) > 2
    sizes = []
    for shard in shards:
        tensors = load_file(shard)
        assert all(index["weight_map"][name] == shard.name for name in tensors)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
    assert max(sizes) <= 100_000
    assert index["metadata"]["total_size"] == sum(sizes)


def test_the_folder_describes_itself(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["dtype"] == "float32"
    for target in config["auto_map"].values():
        module, name = target.split(".")
        assert f"class {name}" in (exported / f"{module}.py").read_text()
    text, ids = config["text_config"], {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert ids.items() <= config.items()
    assert ids.items() <= text.items()
    assert text["max_position_embeddings"] == 131072  # MistralConfig's, which the import's file has
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 1000.0
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2]
    assert generation["suppress_tokens"] == [IMAGE_ID]
    processor = json.loads((exported / "processor_config.json").read_text())
    assert "image_processor" not in processor, "it has a file of its own"
    images = json.loads((exported / "preprocessor_config.json").read_text())
    assert images["size"] == {"height": 28, "width": 28}
    card = (exported / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert "- tiny, step 1, on tiny.jsonl" in card
    assert "- before that: import of language (language_model), vision (vision_model)" in card
    assert "shapes: 0.75" in card
    assert "with transformers 5.10.1 to 5.24.0" in " ".join(card.split())


def test_a_row_that_pads_is_the_end_token_s_only_outside_the_embedding():
    tokens = hf_config.TokenIds(image=5, bos=1, eos=2, pad=2)
    config = hf_config.config_from_model(ModelConfig(), tokens=tokens, dtype="float32")
    assert config["pad_token_id"] == 2
    assert config["text_config"]["pad_token_id"] is None
    assert "max_position_embeddings" not in config["text_config"], "nothing was said about it"


def test_every_file_can_be_read_by_others(exported):
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in exported.iterdir())


CONVERSATIONS = [
    Conversation((Turn("user", "why?"), Turn("assistant", "so."))),
    Conversation((Turn("user", "<image>\nwhat?", 1), Turn("assistant", "a b.")), ("x",)),
    Conversation(
        (
            Turn("user", "<image>\n<image>\nwhat?", 2),
            Turn("assistant", "a."),
            Turn("user", "and so?"),
            Turn("assistant", "b."),
        ),
        ("x", "y"),
    ),
]


def as_parts(conversation):
    """Chat messages with images as parts of their own."""
    result = []
    for turn in conversation.turns:
        text = turn.text.removeprefix("<image>\n" * turn.num_images)
        parts = [{"type": "image"}] * turn.num_images + [{"type": "text", "text": text}]
        result.append({"role": turn.role, "content": parts})
    return result


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_chat_template_makes_training_s_tokens(exported, conversation):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.padding_side == "left"
    rows = ConversationTokenizer(tokenizer, "mistral_v3")(conversation)
    for messages in (conversation.messages, as_parts(conversation)):
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        supervised = [
            (index, bool(mask))
            for index, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
            if index != IMAGE_ID
        ]
        assert [index for index, _ in supervised] == rows.input_ids
        labels = [index if mask else -100 for index, mask in supervised[1:]]
        assert labels == rows.labels[:-1]


def test_a_model_s_own_template_goes_through(tmp_path):
    """From the language model's folder into training, into the export, and back into an import."""
    save_vision(tmp_path / "vision")
    save_language(tmp_path / "language")
    source = (
        "{{ bos_token }}{% for m in messages %}{{ '[INST]' if m.role == 'user' else '' }}"
        "{{ m.content }}{{ '[/INST]' if m.role == 'user' else eos_token }}{% endfor %}"
    )
    (tmp_path / "language" / "chat_template.jinja").write_text(source)
    make_run_folder(tmp_path, tmp_path / "run", "dattn")
    settings = yaml.safe_load((tmp_path / "imported-run" / "config.yaml").read_text())
    assert settings["data"]["template"] == "model"
    (tmp_path / "run" / "config.yaml").write_text(
        (tmp_path / "run" / "config.yaml").read_text().replace("mistral_v3", "model")
    )
    export_checkpoint(tmp_path / "run", tmp_path / "out", ExportOptions())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template.endswith(source)
    training = load_tokenizer(str(tmp_path / "run" / "tokenizer"), template="model")
    for conversation in CONVERSATIONS:
        tokens = ConversationTokenizer(training, "model")(conversation)
        for messages in (conversation.messages, as_parts(conversation)):
            ids = tokenizer.apply_chat_template(messages, return_dict=False)
            assert [index for index in ids if index != IMAGE_ID] == tokens.input_ids
    assert choose_template(tmp_path / "out", tokenizer, "mistral").name == "model"


def test_caption_template_prompts_with_images_alone(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ours = ConversationTokenizer(tokenizer, "plain")
    question = Conversation((Turn("user", "<image>\nsay", 1),), ("x",))
    caption = Conversation((*question.turns, Turn("assistant", "a.")), ("x",))
    template = chat_template("plain")
    for messages, rows in (
        (question.messages, ours.prompt(question)),
        (as_parts(question), ours.prompt(question)),
        (caption.messages, ours(caption)),
        (as_parts(caption), ours(caption)),
    ):
        ids = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False)
        assert [index for index in ids if index != IMAGE_ID] == rows.input_ids
        assert ids.count(IMAGE_ID) == 1


# Of the encoder, of the language model. The window is shorter than an image has rows.
LLAVAS = {
    "siglip-mistral": ("siglip", {"sliding_window": 5}),
    "siglip-llama": ("siglip", {"family": "llama", "tie_word_embeddings": True}),
    "clip-llama": ("clip", {"family": "llama", "vocab_size": 67}),
    "clip-mistral": ("clip", {}),
}
LLAVA_QUESTIONS = [(), ("x",), ("x", "y")]


def llava_run(base, name):
    """The run folder of an `s_attn` model whose adapter is LLaVA's."""
    vision, language = LLAVAS[name]
    originals = base / f"of-{name}"
    save_vision(originals / "vision", family=vision, varied=True)
    save_language(originals / "language", varied=True, **language)
    make_run_folder(originals, base / name, "s_attn", norm="none")
    return base / name


def question_with(images):
    start = "<image>\n" * len(images)
    return Conversation((Turn("user", f"{start}what is this?", len(images)),), images)


@pytest.mark.parametrize("name", LLAVAS)
def test_s_attn_becomes_a_llava_model(tmp_path, name):
    run, output = llava_run(tmp_path, name), tmp_path / "llava"
    export_checkpoint(run, output)
    assert not list(output.glob("*.py")), "it runs on transformers' own code"
    assert 'backend="pil"' in (output / "README.md").read_text()
    encoder = {name for name in SafetensorsFolder(output).shapes if "vision_tower" in name}
    # transformers 4 knows no others, and starts at random what it does not find.
    assert all(name.startswith("model.vision_tower.vision_model.") for name in encoder)
    loaded = load_model(run)
    model = LlavaForConditionalGeneration.from_pretrained(output).eval()
    assert model.config.tie_word_embeddings == loaded.config.model.language.tie_word_embeddings
    processor = AutoProcessor.from_pretrained(output)
    questions = [question_with(images) for images in LLAVA_QUESTIONS]
    pixels = [torch.full((28, 28, 3), 90 * n).byte().numpy() for n in range(1, 3)]
    prompts = [
        Prompt(loaded.conversations.prompt(question), tuple(pixels[: len(question.images)]))
        for question in questions
    ]
    answers = generate_tokens(loaded, prompts, max_new_tokens=8)
    for question, prompt, answer in zip(questions, prompts, answers, strict=True):
        inputs = processor(
            text=loaded.conversations.render(question)[0],
            images=[Image.fromarray(image) for image in prompt.images] or None,
            return_tensors="pt",
            add_special_tokens=False,
        )
        with torch.inference_mode():
            theirs = model(**inputs).logits[0]
        is_text = inputs["input_ids"][0] != IMAGE_ID
        # fp32 through another implementation; logits are of the order of 5.
        ours = text_logits(loaded, prompt)
        torch.testing.assert_close(theirs[is_text], ours, rtol=1e-4, atol=1e-4)
        tokens = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert tokens.tolist() == answer
    destroy_distributed()


@torch.inference_mode()
def text_logits(loaded, prompt):
    """At every text token, of an `s_attn` model."""
    batch = pack_prompts(loaded, [(prompt, [])])
    start, end = batch.layout.text_tokens(0)
    return loaded.model.forward_logits(batch, torch.arange(start, end))


def test_wrong_folders_are_one_error(base, exported, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config\.yaml"):
        export_checkpoint(tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="has no adapter"):
        export_checkpoint(base / "imported-dattn", tmp_path / "out")
    with pytest.raises(CheckpointError, match="not empty"):
        export_checkpoint(base / "dattn", exported)
    with pytest.raises(CheckpointError, match="is a file"):
        export_checkpoint(base / "dattn", exported / "config.json")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_found_first(base, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="disk full: the export needs"):
        export_checkpoint(base / "dattn", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_export_leaves_nothing(base, tmp_path, monkeypatch, error):
    def stop(*arguments):
        raise error

    monkeypatch.setattr(export_hf, "write_shards", stop)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        export_checkpoint(base / "dattn", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_command_line(base, tmp_path, capsys):
    """As a program of its own where it exports: only there is nothing imported yet."""
    call = ["export", "--output", f"{tmp_path}/out", "--checkpoint"]
    assert main([*call, str(tmp_path)]) == 2
    assert "holds no config.yaml" in capsys.readouterr().err.splitlines()[-1]
    done = subprocess.run(
        [sys.executable, "tools/convert_checkpoint.py", *call, f"{base}/dattn"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()

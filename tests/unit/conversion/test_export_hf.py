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

from megatron_dattn.attention import PRESETS, output_rows
from megatron_dattn.conversion import export_hf, hf_config
from megatron_dattn.conversion.export_hf import ExportOptions, export_checkpoint
from megatron_dattn.conversion.hf_processor import chat_template
from megatron_dattn.conversion.safetensors_reader import SafetensorsFolder
from megatron_dattn.data.conversation import Conversation, Turn
from megatron_dattn.data.template import ConversationTokenizer
from megatron_dattn.errors import CheckpointError, ConfigError
from megatron_dattn.inference import Prompt, load_model
from megatron_dattn.inference.prompt import pack_prompts
from megatron_dattn.models.config import ModelConfig
from megatron_dattn.runtime.distributed import destroy_distributed
from tests.support.run_folders import make_run_folder
from tests.unit.conversion.hf_models import save_language, save_vision

ROOT = Path(__file__).parents[3]
IMAGE_ID = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("export")
    save_vision(base / "vision")
    save_language(base / "language")
    make_run_folder(base, base / "dattn", "dattn")
    make_run_folder(base, base / "llava", "s_attn", input_norm=False)
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
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2]
    assert generation["suppress_tokens"] == [IMAGE_ID]
    processor = json.loads((exported / "processor_config.json").read_text())
    older = json.loads((exported / "preprocessor_config.json").read_text())
    assert processor["image_processor"] == older
    card = (exported / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert "stage: tiny" in card
    assert "shapes: 0.75" in card


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


@pytest.mark.parametrize(
    ("preset", "reason"),
    [
        ("s_attn", "adapter.input_norm"),
        ("s_attn_debias", "v2v='causal'"),
        ("aki", "v2v='causal'"),
        ("cca", "v2v='ring'"),
        ("yopo", "v2v='window'"),
        ("exit", "v2v='causal'"),
        ("fastervlm", "v2v='causal'"),
        ("saisa", "every layer whole"),
        ("dattn_cascade", "cross-attention"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(preset, reason):
    with pytest.raises(ConfigError, match=f"'{preset}' cannot be exported: .*{reason}"):
        hf_config.check_exportable(ModelConfig(attention=preset))


def test_all_other_presets_can_be_exported():
    decomposed = {name for name, axes in PRESETS.items() if axes.v2v in ("diagonal", "none")}
    for preset in decomposed - {"saisa", "dattn_cascade"}:
        hf_config.check_exportable(ModelConfig(attention=preset))


def test_s_attn_becomes_a_llava_model(base, tmp_path):
    output = tmp_path / "llava"
    export_checkpoint(base / "llava", output)
    loaded = load_model(base / "llava")
    model = LlavaForConditionalGeneration.from_pretrained(output).eval()
    processor = AutoProcessor.from_pretrained(output)
    question = Conversation(CONVERSATIONS[1].turns[:1], ("x",))
    prompt = Prompt(
        loaded.conversations.prompt(question), (torch.full((28, 28, 3), 200).byte().numpy(),)
    )
    text, _ = loaded.conversations.render(question)
    inputs = processor(
        text=text,
        images=Image.fromarray(prompt.images[0]),
        return_tensors="pt",
        add_special_tokens=False,
    )
    batch = pack_prompts(loaded, [(prompt, [])])
    with torch.inference_mode():
        rows = output_rows(batch.layout, loaded.model.attention)
        ours = loaded.model.forward_logits(batch, rows)[-1]
        theirs = model(**inputs).logits[0, -1]
    # fp32 through another implementation; logits are of the order of 1.
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert not list(output.glob("*.py")), "it runs on transformers' own code"
    destroy_distributed()


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
    monkeypatch.setattr(export_hf.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="GiB free, the export needs"):
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


def test_command_line(base, tmp_path):
    tool = [sys.executable, "tools/convert_checkpoint.py", "export", "--output", tmp_path / "out"]
    missing = subprocess.run(
        [*tool, "--checkpoint", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert missing.returncode == 2
    assert "holds no config.yaml" in missing.stderr.splitlines()[-1]
    done = subprocess.run(
        [*tool, "--checkpoint", base / "dattn"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()

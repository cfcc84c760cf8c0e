"""Generation from a checkpoint: Hugging Face's tokens for text, and no mixing of prompts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_dattn.data.videos import has_av
from megatron_dattn.errors import CheckpointError, DataError
from megatron_dattn.inference import Prompt, encode_images, generate, generate_tokens, load_model
from megatron_dattn.inference.image_cache import can_keep_images
from megatron_dattn.inference.prompt import read_image, video_of
from megatron_dattn.runtime.distributed import destroy_distributed
from tools.generate import main

ROOT = Path(__file__).parents[3]
QUESTIONS = ["what is this?", "a longer question about it.", "why?"]


def prompts_of(loaded, folder):
    images = [[], [folder / "0.png"], [folder / "1.png", folder / "0.png"]]
    return [
        Prompt.from_question(loaded, question, paths)
        for question, paths in zip(QUESTIONS, images, strict=True)
    ]


def test_text_only_answers_are_hugging_faces(base, loaded):
    language = base[1]
    prompt = Prompt.from_question(loaded, QUESTIONS[1])
    expected = language.generate(
        torch.tensor([prompt.tokens.input_ids]), max_new_tokens=12, do_sample=False, pad_token_id=0
    )[0, len(prompt.tokens.input_ids) :]
    (answer,) = generate(loaded, [prompt], max_new_tokens=12)
    assert answer == loaded.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert answer


def test_prompts_in_one_pack_do_not_mix(base, loaded):
    prompts = prompts_of(loaded, base[0])
    together = generate(loaded, prompts, max_new_tokens=8)
    alone = [generate(loaded, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert together == alone


def test_the_image_matters(base, loaded):
    images = [[base[0] / "0.png"], [base[0] / "1.png"]]
    prompts = [Prompt.from_question(loaded, "what?", paths) for paths in images]
    first, second = generate(loaded, prompts, max_new_tokens=16)
    assert first != second


def script_logits(loaded, monkeypatch, script):
    """Let the head say these tokens; returns a list that fills with the tokens it is asked
    about."""
    running = []

    def scripted(hidden_states, tokens, shards):
        running.append(len(tokens))
        tokens = torch.tensor(script[len(running) - 1])
        return torch.nn.functional.one_hot(tokens, len(loaded.tokenizer)).float()

    monkeypatch.setattr(loaded.model.language_model, "gathered_logits", scripted)
    return running


def test_each_prompt_stops_at_its_own_end_token(base, loaded, monkeypatch):
    letter, end = loaded.tokenizer.convert_tokens_to_ids("a"), loaded.tokenizer.eos_token_id
    script = [[letter, letter, letter], [letter, end, letter], [end, letter], [letter]]
    running = script_logits(loaded, monkeypatch, script)
    answers = generate(loaded, prompts_of(loaded, base[0]), max_new_tokens=4)
    assert [answer.replace(" ", "") for answer in answers] == ["aa", "a", "aaaa"]
    assert running == [3, 3, 2, 1]


def test_an_answer_never_holds_an_image(base, loaded, monkeypatch):
    image = loaded.tokenizer.convert_tokens_to_ids("<image>")
    script_logits(loaded, monkeypatch, [[image], [image]])
    prompt = Prompt.from_question(loaded, "why?")
    (tokens,) = generate_tokens(loaded, [prompt], max_new_tokens=2)
    assert len(tokens) == 2
    assert image not in tokens


def test_captions_end_with_their_line(base, monkeypatch):
    loaded = load_model(base[0] / "dattn", template="plain")
    letter = loaded.tokenizer.convert_tokens_to_ids("a")
    (line_break,) = loaded.tokenizer.encode("\n", add_special_tokens=False)
    script_logits(loaded, monkeypatch, [[letter], [line_break]])
    prompt = Prompt.from_question(loaded, "", [base[0] / "0.png"])
    assert generate(loaded, [prompt], max_new_tokens=9) == ["a"]
    destroy_distributed()


def test_questions_cannot_smuggle_images(loaded):
    with pytest.raises(DataError, match="<image>"):
        Prompt.from_question(loaded, "see <image>")
    with pytest.raises(DataError, match="control token"):
        Prompt.from_question(loaded, "x [/INST] y")


def test_half_a_character_is_no_question(loaded):
    """A terminal's bytes that are no UTF-8 arrive as such."""
    with pytest.raises(DataError, match=r"'x \\udcff': a text holds half a character at place 2"):
        Prompt.from_question(loaded, "x \udcff")


def test_wrong_folders_are_one_error(base, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="has no adapter"):
        load_model(base[0] / "imported-dattn")


def test_kept_images_and_files_answer_alike(base):
    loaded = load_model(base[0] / "dattn")
    files = [base[0] / "0.png", base[0] / "1.png"]
    kept = encode_images(loaded, files)
    for given in ([kept[0]], [kept[1], kept[0]], [files[0], kept[1]]):
        named = [files[kept.index(i)] if i in kept else i for i in given]
        prompts = [Prompt.from_question(loaded, QUESTIONS[0], i) for i in (given, named)]
        answers = [generate(loaded, [prompt], max_new_tokens=8) for prompt in prompts]
        assert answers[0] == answers[1]
    with pytest.raises(DataError, match=r"none\.png"):
        encode_images(loaded, [base[0] / "none.png"])
    destroy_distributed()


@pytest.fixture
def clip(tmp_path):
    """A folder with the twelve frames of a video."""
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (40, 20), (20 * number, 99, 50)).save(folder / f"{number:02}.png")
    return folder


def test_a_video_is_asked_about_by_its_frames(base, loaded, clip):
    video = video_of(clip)
    prompt = Prompt.from_question(loaded, "why?", [base[0] / "0.png", video])
    first, second = Prompt.from_question(
        loaded, "why?", [base[0] / "0.png"] * 2
    ).tokens.image_offsets
    assert prompt.tokens.image_offsets == (first, *[second] * 8)
    reds = [int(square[0, 0, 0]) // 20 for square in prompt.pixels[1:]]
    assert reds == [0, 1, 3, 4, 6, 7, 9, 11]
    answer = generate_tokens(loaded, [prompt], max_new_tokens=6)
    if can_keep_images(loaded):
        kept = encode_images(loaded, [base[0] / "0.png", video])
        assert [len(image.squares) for image in kept] == [1, 8]
        again = Prompt.from_question(loaded, "why?", kept)
        assert generate_tokens(loaded, [again], max_new_tokens=6) == answer


def test_a_video_that_cannot_be_used_is_named(loaded, clip, tmp_path):
    (clip / "03.png").write_bytes(b"noise")
    with pytest.raises(DataError, match=r"^video .*00\.png'.*not an image"):
        Prompt.from_question(loaded, "why?", [video_of(clip)])
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none' has no frames"):
        video_of(tmp_path / "none")
    if has_av():
        with pytest.raises(DataError, match=r"away\.mp4.*No such file"):
            Prompt.from_question(loaded, "why?", [video_of(tmp_path / "away.mp4")])


def test_command_line_asks_about_a_video(base, clip, capsys):
    call = ["--max-new-tokens", "4", "--checkpoint", f"{base[0]}/dattn", "--question", "why?"]
    assert main([*call, "--video", str(clip)]) == 0
    loaded = load_model(base[0] / "dattn")
    prompt = Prompt.from_question(loaded, "why?", [video_of(clip)])
    assert capsys.readouterr().out.strip() == generate(loaded, [prompt], max_new_tokens=4)[0]
    destroy_distributed()


def test_command_line_asks_several_questions(base, capsys):
    call = ["--max-new-tokens", "4", "--checkpoint", f"{base[0]}/dattn"]
    call += ["--image", f"{base[0]}/0.png"]

    def lines(*questions):
        asked = [word for question in questions for word in ("--question", question)]
        assert main([*call, *asked]) == 0
        return capsys.readouterr().out.splitlines()

    (first,), (second,) = lines("why?"), lines("what is this?")
    both = lines("why?", "what is this?")
    assert both == ["> why?", first, "> what is this?", second]


def test_command_line(base, tmp_path, capsys):
    """As a program of its own where it answers: only there is nothing imported yet."""
    call = ["--max-new-tokens", "4", "--checkpoint", f"{base[0]}/dattn", "--question", "why?"]
    done = subprocess.run(
        [sys.executable, "tools/generate.py", *call, "--image", f"{base[0]}/0.png"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert main([*call, "--image", f"{tmp_path}/none.png"]) == 2
    error = capsys.readouterr().err
    assert "none.png" in error.splitlines()[-1]
    assert "Traceback" not in error


@pytest.mark.parametrize("content", [b"xx", None])
def test_an_image_that_cannot_be_used_is_named_once(loaded, tmp_path, content):
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        Prompt.from_question(loaded, "why?", [path])
    assert str(raised.value).count("broken.png") == 1


def test_lack_of_memory_is_one_error_that_names_the_image(base, loaded, monkeypatch):
    def no_memory(*args, **options):
        raise MemoryError

    monkeypatch.setattr("megatron_dattn.data.images.decode_image", no_memory)
    with pytest.raises(DataError, match=r"^memory ran out while decoding image .*0\.png'$"):
        read_image(loaded, base[0] / "0.png")

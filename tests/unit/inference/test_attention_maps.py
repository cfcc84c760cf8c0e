"""What an answer looked at: as when its tokens were generated, and drawn in the right place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_dattn.attention.attention_maps import alpha_v
from megatron_dattn.errors import ConfigError, DataError, UserError
from megatron_dattn.inference import (
    AttentionMaps,
    Prompt,
    attention_maps,
    generate_tokens,
    load_model,
)
from megatron_dattn.inference.prompt import pack_prompts
from megatron_dattn.runtime.distributed import destroy_distributed
from tools.generate import main as generate_main
from tools.show_attention import chosen_tokens, draw, main

ROOT = Path(__file__).parents[3]
LAYERS, HEADS, GRID, PATCH = 2, 4, (3, 3), 8


@pytest.fixture(params=["dattn", "s_attn", "saisa", "fastervlm"])
def loaded(base, request):
    yield load_model(base[0] / request.param)
    destroy_distributed()


def asked(loaded, folder, *images):
    prompt = Prompt.from_question(loaded, "what is this?", [folder / name for name in images])
    (answer,) = generate_tokens(loaded, [prompt], max_new_tokens=4)
    return prompt, answer


def test_shapes_and_shares(base, loaded):
    prompt, answer = asked(loaded, base[0], "0.png", "1.png")
    seen = attention_maps(loaded, prompt, answer)
    assert len(seen.tokens) == len(answer) == 4
    assert seen.alpha.shape == (LAYERS, 4, HEADS)
    assert seen.maps.shape == (LAYERS, 4, 2 * 9)
    assert seen.grids == (GRID, GRID)
    # One softmax over images and text: what images get is alpha_V. fp32 sums of 18 numbers.
    torch.testing.assert_close(seen.maps.sum(-1), seen.alpha.mean(-1), atol=1e-6, rtol=0)
    assert seen.alpha.min() > 0
    assert seen.alpha.max() < 1


def test_it_is_what_each_token_saw_when_it_was_generated(base, loaded):
    prompt, answer = asked(loaded, base[0], "0.png")
    seen = attention_maps(loaded, prompt, answer)
    for place in range(len(answer)):
        weights = []
        batch = pack_prompts(loaded, [(prompt, answer[:place])])
        with torch.inference_mode():
            loaded.model.forward_logits(
                batch,
                torch.zeros(1, dtype=torch.int64),
                lambda _, *states, w=weights: w.append(alpha_v(*states)[-1]),
            )
        # The same tokens; fp32 sums over differently padded batches.
        torch.testing.assert_close(seen.alpha[:, place], torch.stack(weights), atol=1e-6, rtol=0)


def test_an_end_token_is_not_looked_at(base, loaded):
    prompt, answer = asked(loaded, base[0], "0.png")
    end = loaded.tokenizer.eos_token_id
    assert (
        attention_maps(loaded, prompt, [*answer, end]).tokens
        == attention_maps(loaded, prompt, answer).tokens
    )
    with pytest.raises(DataError, match="the answer is empty"):
        attention_maps(loaded, prompt, [end])


def test_without_an_image_there_is_nothing_to_see(base, loaded):
    prompt, answer = asked(loaded, base[0])
    with pytest.raises(DataError, match="without an image"):
        attention_maps(loaded, prompt, answer)


def test_kept_patches_stand_where_they_were(base):
    """FasterVLM keeps two of nine patches, by the attention that they receive in the encoder."""
    loaded = load_model(base[0] / "fastervlm")
    prompt, answer = asked(loaded, base[0], "0.png", "1.png")
    seen = attention_maps(loaded, prompt, answer)
    with torch.inference_mode():
        pixels = loaded.preprocessor.normalise(prompt.pixels)
        _, received = loaded.model.vision_model(pixels, with_attention=True)
    for number, of_image in enumerate(received):
        best = sorted(of_image.topk(2).indices.tolist())
        assert seen.image_maps(0)[number].flatten().nonzero().flatten().tolist() == best
    destroy_distributed()


def test_a_cross_attention_has_maps_and_no_alpha(base):
    """Its own softmax over the patches of both images, in each of the layers."""
    loaded = load_model(base[0] / "dattn_cascade")
    prompt, answer = asked(loaded, base[0], "0.png", "1.png")
    seen = attention_maps(loaded, prompt, answer)
    assert seen.alpha is None
    assert seen.mean_alpha(0) is None
    assert seen.maps.shape == (LAYERS, 4, 2 * 9)
    torch.testing.assert_close(seen.maps.sum(-1), torch.ones(LAYERS, 4))
    assert seen.table() == [
        "the preset 'dattn_cascade' reads images by attention of its own, apart from the text's: "
        "there is no alpha_V"
    ]
    # By hand: the last text token's scores in the first layer.
    layer, states = loaded.model.language_model.decoder.layers[0], []
    cross = layer.cross_attention
    cross.register_forward_pre_hook(lambda _, args: states.extend(args[:2]))
    with torch.inference_mode():
        batch = pack_prompts(loaded, [(prompt, answer[:-1])])
        loaded.model.forward_logits(batch, torch.zeros(1, dtype=torch.int64))
        visual, text = states
        key, _ = cross.keys_values(visual)
        query = cross.linear_q(text)[0].view(len(text), -1, cross.head_dim)[-1]
        keys = key.repeat_interleave(len(query) // key.shape[1], dim=1)
        scores = torch.einsum("hd,khd->hk", query, keys) * cross.head_dim**-0.5
    # fp32 sums of a few products.
    torch.testing.assert_close(seen.maps[0, -1], scores.softmax(-1).mean(0), atol=1e-6, rtol=0)
    destroy_distributed()


def made_up_look() -> AttentionMaps:
    """Two layers, three tokens, two heads, an image of 2 x 3 and one of 1 x 2 patches."""
    generator = torch.Generator().manual_seed(0)
    return AttentionMaps(
        "dattn",
        ("a", "$b", "c"),
        torch.rand(2, 3, 2, generator=generator),
        torch.rand(2, 3, 8, generator=generator),
        ((2, 3), (1, 2)),
    )


def test_maps_are_cut_by_image_and_averaged_over_layers():
    seen = made_up_look()
    first, second = seen.image_maps(1)
    assert torch.equal(first, seen.maps[:, 1, :6].mean(0).view(2, 3))
    assert torch.equal(second, seen.maps[:, 1, 6:].mean(0).view(1, 2))
    assert torch.equal(seen.image_maps(1, [2])[0], seen.maps[1, 1, :6].view(2, 3))
    assert seen.mean_alpha(2, [1]) == pytest.approx(seen.alpha[0, 2].mean().item())
    with pytest.raises(ConfigError, match="no layer 3; the model has layers 1 to 2"):
        seen.image_maps(0, [1, 3])


def test_the_table_has_every_head_of_every_layer():
    seen = made_up_look()
    title, head, *lines = seen.table()
    assert title == "alpha_V by layer and head, mean over the answer's 3 tokens"
    assert head.split() == ["layer", "mean", "h1", "h2"]
    heads = seen.alpha.mean(1)[1]
    assert lines[1].split() == ["2", *(f"{x.item():.2f}" for x in (heads.mean(), *heads))]
    assert len(lines) == 2
    assert len({len(line) for line in (head, *lines)}) == 1, "columns stand below each other"


def test_panels_lay_patches_over_the_pixels_they_were_made_of():
    seen = made_up_look()
    images = [np.zeros((20, 28, 3), np.uint8), np.zeros((11, 17, 3), np.uint8)]
    figure = draw(seen, images, patch_size=8, tokens=[0, 1], layers=[2])
    panels = [ax for ax in figure.axes if ax.get_visible()]
    assert len(panels) == 4
    for ax, (token, number) in zip(panels, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        picture, heat = ax.get_images()
        height, width = images[number].shape[:2]
        assert picture.get_extent() == [0, width, height, 0]
        rows, columns = seen.grids[number]
        assert heat.get_extent() == [0, 8 * columns, 8 * rows, 0]
        assert np.array_equal(heat.get_array(), seen.image_maps(token, [2])[number])
        assert ax.get_xlim() == (0, width)
        assert repr(seen.tokens[token]) in ax.get_title()
        assert f"{seen.mean_alpha(token, [2]):.2f}" in ax.get_title()


def test_one_token_can_be_chosen():
    seen = made_up_look()
    assert chosen_tokens(seen, None) == [0, 1, 2]
    assert chosen_tokens(seen, 3) == [2]
    for wrong in (0, 4):
        with pytest.raises(UserError, match=f"--token {wrong} .* tokens 1 to 3"):
            chosen_tokens(seen, wrong)


@pytest.mark.parametrize("preset", ["dattn", "s_attn", "fastervlm", "dattn_cascade"])
def test_the_tool_writes_a_picture(base, tmp_path, preset, capsys):
    output = tmp_path / "attention.png"
    call = ["--checkpoint", base[0] / preset, "--image", base[0] / "0.png", "--question", "why?"]
    call = [str(word) for word in (*call, "--output", output, "--max-new-tokens", 3)]
    assert main(call) == 0
    assert capsys.readouterr().out.strip()
    wide = Image.open(output)
    assert main([*call, "--token", "1", "--layers", "2"]) == 0
    narrow = Image.open(output)
    assert wide.width == 3 * narrow.width


BEFORE_LOADING = [
    (["--token", "9"], "--token 9 is no token of an answer with at most 2"),
    (["--token", "0"], "--token 0 is no token"),
    (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
    (["--output", "nowhere/attention.png"], "cannot write the picture 'nowhere/attention.png'"),
    (["--output", "attention.xyz"], "choose one of the formats"),
    (["--output", "."], "cannot write the picture '.': it is a folder"),
]
BEFORE_ASKING = [
    (["--layers", "1", "9"], "no layer 9; the model has layers 1 to 2"),
    (["--image", "none.png"], "none.png"),
]


@pytest.mark.parametrize(("extra", "message"), [*BEFORE_LOADING, *BEFORE_ASKING])
def test_errors_are_one_line_before_anything_is_generated(
    base, tmp_path, extra, message, capsys, monkeypatch
):
    def fail(*arguments, **options):
        raise AssertionError("too early")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megatron_dattn.inference.generate_tokens", fail)
    if (extra, message) in BEFORE_LOADING:
        monkeypatch.setattr("megatron_dattn.inference.load_model", fail)
    call = ["--checkpoint", str(base[0] / "dattn"), "--image", str(base[0] / "0.png")]
    assert main([*call, "--max-new-tokens", "2", *extra]) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert captured.out == ""


@pytest.mark.parametrize(
    ("preset", "images", "table"),
    [
        ("dattn", ["0.png"], "alpha_V by layer and head, mean over the answer's 3 tokens"),
        ("fastervlm", ["0.png"], "alpha_V by layer and head, mean over the answer's 3 tokens"),
        ("dattn_cascade", ["0.png"], "the preset 'dattn_cascade' reads images by attention of"),
        ("dattn", [], "no alpha_V: without an image there is no attention to show"),
    ],
)
def test_generate_prints_the_answer_and_then_what_there_is_of_the_table(
    base, preset, images, table, capsys
):
    call = ["--checkpoint", base[0] / preset, "--question", "why?", "--max-new-tokens", "3"]
    for image in images:
        call += ["--image", base[0] / image]
    assert generate_main([str(word) for word in call]) == 0
    answer = capsys.readouterr().out
    assert generate_main([str(word) for word in (*call, "--alpha")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(answer + "\n" + table)

"""The pictures say what the oracle says, and the command line what the counts say."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dattn.attention import PRESETS, AttentionConfig, TextToVisual, VisualTokensConfig
from megatron_dattn.planner.preset_drawing import drawn_tokens, panels
from tools.show_preset import main

# In reading order: T0, image V0..V11 of 3 x 4, T1 T2, image V12..V15 of 2 x 2, T3 T4 T5.
T, V, W = "#", 12 * "#", 4 * "#"


def marks(preset: str) -> dict[str, str]:
    return {token.name: token.marks for token in drawn_tokens(PRESETS[preset])}


def positions(preset: str) -> dict[str, str]:
    return {token.name: token.position for token in drawn_tokens(PRESETS[preset])}


def test_s_attn_is_a_triangle_with_positions_in_reading_order() -> None:
    tokens = drawn_tokens(PRESETS["s_attn"])
    for place, token in enumerate(tokens):
        assert token.marks == "#" * (place + 1) + "." * (len(tokens) - place - 1)
        assert token.position == str(place)


def test_dattn_sees_images_without_positions() -> None:
    drawn = marks("dattn")
    assert drawn["T0"] == "#" + 12 * "o" + ".." + 4 * "o" + "..."
    assert drawn["T3"] == "#" + 12 * "o" + "##" + 4 * "o" + "#.."
    assert drawn["V1"] == "..=" + 19 * "."
    assert positions("dattn")["V3"] == "-"
    assert [positions("dattn")[f"T{i}"] for i in range(6)] == list("012345")


def test_an_image_sees_the_prompt_behind_it() -> None:
    drawn = marks("aki")
    assert drawn["V0"] == T + "#" + 11 * "." + "##" + 4 * "." + "#.."
    assert drawn["V15"] == T + V + "##" + W + "#.."


def test_concentric_patches_share_positions() -> None:
    ids = positions("cca")
    assert [ids[f"V{token}"] for token in range(4, 8)] == ["1", "2", "2", "1"]
    assert [ids[name] for name in ("T0", "T1", "T2", "V12", "T3")] == ["0", "3", "4", "5", "6"]


def outline(preset: str, num_layers: int = 10) -> list[tuple[str, str]]:
    """Of each panel: its title, and the kinds of its tokens that see anything."""
    return [
        (panel.title, "".join(row.name[0] for row in panel.tokens if row.marks.strip(".")))
        for panel in panels(PRESETS[preset], num_layers)
    ]


def test_layers_that_differ_have_a_panel_each() -> None:
    whole, text = "T" + 12 * "V" + "TT" + 4 * "V" + "TTT", 6 * "T"
    assert outline("s_attn") == [("layers 1 to 10", whole)]
    assert outline("shortv") == [
        ("layers 1 to 4", whole),
        ("layers 5 to 10: visual tokens are read and stay as they are", text),
    ]
    assert outline("exit") == [
        ("layers 1 to 5", whole),
        ("layers 6 to 10: images are gone", text),
    ]
    assert outline("exit", 2) == [("layer 1", whole), ("layer 2: images are gone", text)]
    (title, kinds), *_ = outline("yopo")
    assert (title, kinds) == ("layers 1 to 5: visual tokens pass 0.5 of the FFN", whole)


def test_frozen_layers_are_drawn_as_text_reads_them() -> None:
    whole, frozen = (panel.tokens for panel in panels(PRESETS["shortv"], 5))
    for before, after in zip(whole, frozen, strict=True):
        assert after.marks == (len(whole) * "." if after.name[0] == "V" else before.marks)
        assert after.position == before.position


def test_text_keeps_its_positions_when_images_are_gone() -> None:
    _, gone = panels(PRESETS["exit"], 2)
    assert [row.position for row in gone.tokens] == ["0", "13", "14", "19", "20", "21"]
    assert [row.marks for row in gone.tokens] == ["#" * n + "." * (6 - n) for n in range(1, 7)]


def test_only_kept_patches_are_drawn() -> None:
    names = [token.name for token in drawn_tokens(PRESETS["fastervlm"])]
    assert names == ["T0", "V0", "V1", "V2", "T1", "T2", "V3", "T3", "T4", "T5"]


def test_layers_apart_from_each_other_share_a_panel() -> None:
    config = replace(PRESETS["s_attn"], visual=VisualTokensConfig(frozen=(0.4, 0.6)))
    assert [panel.title for panel in panels(config, 5)] == [
        "layers 1 to 2, 4 to 5",
        "layer 3: visual tokens are read and stay as they are",
    ]


def test_an_inherited_window_hides_images() -> None:
    config = AttentionConfig(t2v=TextToVisual(window="inherit"))
    # Three text tokens from the last image to the last token, five from the first image.
    assert drawn_tokens(config, window=3)[-1].marks == 15 * "." + "...." + "###"
    assert drawn_tokens(config, window=4)[-1].marks == 13 * "." + ".#" + "oooo" + "###"
    assert drawn_tokens(config, window=6)[-1].marks == "#" + 12 * "o" + "##" + "oooo" + "###"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_says_where_it_comes_from_and_what_it_costs(preset: str) -> None:
    for word in ("Parameters: ", "Cost"):
        assert word in " ".join(PRESETS[preset].about.split())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_shown(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "preset.png"
    assert main([preset, "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert shown.startswith(f"{preset}: v2v {PRESETS[preset].v2v}")
    assert " ".join(PRESETS[preset].about.split()) in " ".join(shown.split())


def test_the_cost_of_the_formula_stands_beside_s_attns(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--hidden-size", "64", "--num-attention-heads", "4", "--num-key-value-heads", "2"]
    sizes += ["--head-dim", "16", "--intermediate-size", "128"]
    sample = ["--grid", "30", "100", "--text-tokens", "1000", "--text-before", "0"]
    assert main(["dattn", *sample, *sizes]) == 0
    *_, dattn, s_attn = capsys.readouterr().out.splitlines()
    # V2V, V2T, T2V, T2T in thousands of pairs; then projections, attention, FFN, total in GFLOP.
    pairs = [0.0, 0.0, 3000.0, 500.5]
    projections = 2 * 64 * (64 * 1000 + 64 * 4000 + 64 * 4000) / 1e9
    attention, ffn = 4 * 64 * 3500.5e3 / 1e9, 6 * 64 * 128 * 4000 / 1e9
    expected = [*pairs, projections, attention, ffn, projections + attention + ffn]
    printed = [float(cell) for cell in dattn.split()[1:]]
    assert printed[:-1] == pytest.approx(expected, abs=0.006)
    assert s_attn.split()[0] == "s_attn"
    assert float(s_attn.split()[-1]) == 1.0
    assert printed[-1] == pytest.approx(expected[-1] / float(s_attn.split()[-2]), abs=0.002)


def test_a_window_is_drawn_counted_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    sample = [
        "--grid",
        "4",
        "5",
        "--text-tokens",
        "20",
        "--text-before",
        "0",
        "--prompt-tokens",
        "0",
    ]
    assert main(["s_attn", "--window", "4", *sample]) == 0
    shown = capsys.readouterr().out
    assert "sliding window: 4, counts all tokens, hides images" in shown
    assert shown.splitlines()[-1].split()[1:5] == ["0.1", "0.0", "0.0", "0.1"]  # thousands of pairs
    assert main(["dattn", "--window", "4"]) == 0
    assert "counts text tokens, never hides images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["dattention"], "unknown attention preset 'dattention'"),
        (["dattn", "--text-before", "300"], "stands after 300 text tokens"),
        (["dattn", "--output", "missing/a.png"], "there is no folder 'missing'"),
        (["dattn", "--output", "a.xyz"], "'a.xyz' names no kind of picture; end it in one of "),
        (["dattn", "--output", "a"], "'a' names no kind of picture"),
        (["dattn", "--num-layers", "0"], "--num-layers is at least 1; it is 0"),
        (["dattn", "--hidden-size", "-4"], "--hidden-size is at least 1; it is -4"),
        (["dattn", "--window", "0"], "--window is at least 1; it is 0"),
        (["dattn", "--grid", "0", "4"], "empty patch grid"),
    ],
)
def test_users_mistakes_are_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_picture_that_cannot_be_written_is_the_user_s_to_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").mkdir()
    assert main(["dattn", "--output", str(tmp_path / "a.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err

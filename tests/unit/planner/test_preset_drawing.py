"""The pictures say what the oracle says."""

from dataclasses import replace

from megatron_dattn.attention import PRESETS, AttentionConfig
from megatron_dattn.attention.config import TextToVisual
from megatron_dattn.attention.visual_config import VisualTokensConfig
from megatron_dattn.planner.preset_drawing import drawn_tokens, panels

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

"""The pictures say what the oracle says, and the command line what the counts say."""

from pathlib import Path

import pytest

from megatron_dattn.attention import PRESETS
from megatron_dattn.attention.__main__ import main
from megatron_dattn.attention.drawing import drawn_rows

# In reading order: T0, image V0..V11 of 3 x 4, T1 T2, image V12..V15 of 2 x 2, T3 T4 T5.
T, V, W = "#", 12 * "#", 4 * "#"


def marks(preset: str) -> dict[str, str]:
    return {row.name: row.marks for row in drawn_rows(PRESETS[preset])}


def positions(preset: str) -> dict[str, str]:
    return {row.name: row.position for row in drawn_rows(PRESETS[preset])}


def test_s_attn_is_a_triangle_with_positions_in_reading_order() -> None:
    rows = drawn_rows(PRESETS["s_attn"])
    for place, row in enumerate(rows):
        assert row.marks == "#" * (place + 1) + "." * (len(rows) - place - 1)
        assert row.position == str(place)


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
    assert [ids[f"V{row}"] for row in range(4, 8)] == ["1", "2", "2", "1"]
    assert [ids[name] for name in ("T0", "T1", "T2", "V12", "T3")] == ["0", "3", "4", "5", "6"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_shown(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "preset.png"
    assert main([preset, "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith(f"{preset}: v2v {PRESETS[preset].v2v}")


def test_the_cost_of_the_formula_stands_beside_s_attns(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--hidden-size", "64", "--num-attention-heads", "4", "--num-key-value-heads", "2"]
    sizes += ["--head-dim", "16", "--intermediate-size", "128"]
    sample = ["--grid", "30", "100", "--text-rows", "1000", "--text-before", "0"]
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


def test_users_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dattention"]) == 2
    assert main(["dattn", "--text-before", "300"]) == 2
    unknown, too_late = capsys.readouterr().err.splitlines()
    assert "unknown attention preset 'dattention'" in unknown
    assert "stands after 300 text rows" in too_late

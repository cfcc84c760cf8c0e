"""The command line says what the presets and the counts say."""

from pathlib import Path

import pytest

from megatron_dattn.attention import PRESETS
from tools.show_preset import main


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

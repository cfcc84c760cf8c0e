"""The trace names the files that a command runs through, and only those."""

import pytest

from tools.trace_code import ROOT, main

SHOW = [str(ROOT / "tools" / "show_preset.py"), "dattn"]


def files_in(report: str) -> list[str]:
    return [line.split()[1] for line in report.splitlines() if line.strip().endswith(".py")]


def test_a_command_is_traced(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SHOW) == 0
    whole = files_in(capsys.readouterr().out)
    assert "megatron_dattn/planner/preset_drawing.py" in whole
    assert "megatron_dattn/planner/decoder_flops.py" in whole
    assert not [name for name in whole if "/training/" in name]
    assert main(["--within", "decoder_flops", *SHOW]) == 0
    inside = files_in(capsys.readouterr().out)
    assert set(inside) < set(whole)
    assert "megatron_dattn/planner/decoder_flops.py" in inside
    assert "megatron_dattn/planner/preset_drawing.py" not in inside


def test_the_command_s_exit_code_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SHOW[0], "no_preset"]) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([])

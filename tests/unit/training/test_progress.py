"""The progress bar: for a terminal only."""

import pytest

from megatron_dattn.training.progress import ProgressBar


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_silent_without_a_terminal(mode, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(mode, first_step=0, last_step=3) as bar:
        bar.advance(1.0)
    assert capsys.readouterr().err == ""


def test_counts_from_the_resumed_step(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("on", first_step=2, last_step=4) as bar:
        bar.advance(1.25)
        bar.advance(0.5)
    shown = capsys.readouterr().err
    assert "2/4" in shown
    assert "4/4" in shown
    assert "loss 0.5000" in shown

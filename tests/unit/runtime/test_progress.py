"""Bars are for whoever watches a terminal."""

import io

import pytest

from megatron_dattn.runtime.progress import bar, unseen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_a_pass(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    with bar("exporting", 4000) as advance:
        advance(1000)
        advance(3000)
    return stream.getvalue()


def test_a_terminal_shows_what_is_done_of_how_much(monkeypatch):
    shown = run_a_pass(Terminal(), monkeypatch)
    assert "exporting: 100%" in shown
    assert "4.00k/4.00k" in shown


def test_a_file_gets_nothing(monkeypatch):
    assert not run_a_pass(io.StringIO(), monkeypatch)
    with unseen("exporting", 4000) as advance:
        advance(1000)

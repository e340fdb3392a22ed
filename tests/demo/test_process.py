"""Whatever is started is ended, also when Ctrl-C comes before anybody has taken it over."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from scripts.demolib.process import Background
from scripts.interrupts import interrupts_wait


def test_an_interrupt_in_mid_start_leaves_a_process_that_is_still_known(tmp_path: Path) -> None:
    known = len(Background.started)

    def interrupted_start() -> None:
        with interrupts_wait():
            signal.raise_signal(signal.SIGINT)
            Background(["sleep", "1000"], tmp_path / "log")

    with pytest.raises(KeyboardInterrupt):
        interrupted_start()
    assert len(Background.started) == known + 1
    assert not Background.started[-1].ended()
    Background.kill_all()
    assert Background.started[-1].ended()


def test_without_an_interrupt_nothing_is_raised_and_the_handler_is_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts_wait():
        pass
    assert signal.getsignal(signal.SIGINT) is before

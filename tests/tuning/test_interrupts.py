"""A signal waits for the end of a step; a second one does not."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from llmsparse.tuning.interrupts import Interrupts


def test_ctrl_c_is_held_back_until_it_is_delivered() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert not interrupts.pending
        interrupts.deliver()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.pending
        with pytest.raises(KeyboardInterrupt):
            interrupts.deliver()
    assert signal.getsignal(signal.SIGINT) is before


def test_who_insists_is_heard_at_once() -> None:
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.deliver()
        assert not interrupts.pending


def test_what_nobody_has_delivered_is_delivered_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts():
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(ZeroDivisionError), Interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        raise ZeroDivisionError


def test_a_process_that_lets_sigterm_kill_it_keeps_doing_so() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with Interrupts():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_go_without() -> None:
    seen: list[bool] = []

    def work() -> None:
        with Interrupts() as interrupts:
            interrupts.deliver()
            seen.append(interrupts.pending)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]

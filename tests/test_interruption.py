"""A wish to stop is not lost, wherever it arrives."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from diffult_ray import interruption


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    monkeypatch.setattr(interruption, "REPEAT", 0.05)
    monkeypatch.setattr(interruption, "TWIN", 0.0)
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    interruption.listen()
    yield
    interruption.heard()
    for number, handler in before.items():
        signal.signal(number, handler)


def send_and_wait(number: int) -> None:
    os.kill(os.getpid(), number)
    threading.Event().wait(10)


@pytest.mark.parametrize("number", interruption.SIGNALS, ids=lambda n: n.name)
def test_it_is_raised_again_where_the_first_was_lost(number):
    with pytest.raises(KeyboardInterrupt):
        send_and_wait(number)
    with pytest.raises(KeyboardInterrupt):
        threading.Event().wait(10)


def test_once_it_is_heard_nothing_disturbs_the_cleaning_up():
    with pytest.raises(KeyboardInterrupt):
        send_and_wait(signal.SIGTERM)
    interruption.heard()
    assert not threading.Event().wait(0.3)


def test_a_library_cannot_take_the_signals():
    def theirs(*_):
        raise SystemExit(1)

    with interruption.kept():
        signal.signal(signal.SIGTERM, theirs)
        before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # others are none of ours
        assert signal.signal(signal.SIGUSR1, before) == signal.SIG_IGN
        with pytest.raises(KeyboardInterrupt):
            send_and_wait(signal.SIGTERM)
    interruption.heard()
    signal.signal(signal.SIGTERM, theirs)
    assert signal.getsignal(signal.SIGTERM) is theirs


def test_what_is_lost_in_a_callback_is_no_news(capfd):
    class Fragile:
        def __del__(self):
            raise self.error

    for error in (KeyboardInterrupt(), ValueError("kept")):
        fragile = Fragile()
        fragile.error = error
        del fragile
    told = capfd.readouterr().err
    assert "KeyboardInterrupt" not in told and "ValueError: kept" in told


def test_one_that_is_deferred_comes_at_a_check_or_at_the_end():
    reached = []
    with pytest.raises(KeyboardInterrupt), interruption.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("after the signal")
        interruption.check()
        reached.append("after the check")
    assert reached == ["after the signal"]
    interruption.heard()
    with pytest.raises(KeyboardInterrupt), interruption.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("the end")
    assert reached[-1] == "the end"
    interruption.heard()
    with interruption.deferred():
        interruption.check()


def test_one_that_arrives_twice_is_one(monkeypatch):
    monkeypatch.setattr(interruption, "TWIN", 60.0)
    monkeypatch.setattr(interruption, "_first", -60.0)
    reached = []
    with pytest.raises(KeyboardInterrupt), interruption.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("after both")
    assert reached == ["after both"]


def test_a_second_one_does_not_wait():
    reached = []
    with pytest.raises(KeyboardInterrupt), interruption.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("after the first")
        send_and_wait(signal.SIGINT)
        reached.append("after the second")
    assert reached == ["after the first"]

"""A signal stops at once what may be stopped, and waits for what must be finished."""
import os
import signal

import pytest

from machine import signals


@pytest.fixture(autouse=True)
def installed():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals.install()
    yield
    signals._received.clear()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_outside_a_step_it_is_raised_where_it_arrives(number):
    with pytest.raises(signals.Interrupted) as stopped:
        os.kill(os.getpid(), number)
        pytest.fail("went on")
    assert stopped.value.signal == number


def test_a_library_that_catches_every_exception_does_not_swallow_it():
    with pytest.raises(signals.Interrupted):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            pytest.fail("swallowed")


def test_inside_it_waits_for_the_outermost_end():
    done = []
    with pytest.raises(signals.Interrupted):
        with signals.deferred():
            with signals.deferred():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("beyond")
    assert done == ["inner", "outer"]
    assert signals.received() == signal.SIGTERM


def test_an_error_inside_is_not_hidden_by_a_signal():
    with pytest.raises(ZeroDivisionError):
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            raise ZeroDivisionError
    assert signals._deferring == 0


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_a_signal_ends_the_process(monkeypatch, first):
    ended = []
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    with signals.deferred():
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGINT)
        signals._received.clear()
    assert ended == [130]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_sigterm_after_a_signal_changes_nothing(monkeypatch, first):
    """A killed parent's death may be told more than once; what is being saved then must be saved."""
    monkeypatch.setattr(signals.os, "_exit", lambda status: pytest.fail(f"ended with {status}"))
    done = []
    with pytest.raises(signals.Interrupted) as stopped:
        with signals.deferred():
            os.kill(os.getpid(), first)
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("step")
    os.kill(os.getpid(), signal.SIGTERM)
    done.append("saved")
    assert done == ["step", "saved"] and stopped.value.signal == first

"""Signals that ask a run to stop: the first is remembered, and a terminal that goes may send several."""

import os
import signal

import pytest

from dsv3_jax.cluster.stop import stop_signals
from dsv3_jax.training.signals import StopRequest


@pytest.fixture
def ignored():
    """A handler for all of them that only counts."""
    came = []
    old = {number: signal.signal(number, lambda number, _: came.append(number)) for number in stop_signals()}
    yield came
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_one_is_remembered(ignored, number):
    with StopRequest() as stop:
        assert not stop.came
        os.kill(os.getpid(), number)
        assert stop.came
        assert stop.signal == number
        assert ignored == []


def test_a_second_one_is_not_caught_but_a_second_hangup_is(ignored):
    with StopRequest() as stop:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.signal == signal.SIGHUP
        assert ignored == [signal.SIGTERM]
    os.kill(os.getpid(), signal.SIGHUP)
    assert ignored == [signal.SIGTERM, signal.SIGHUP]


def test_who_ignores_hangups_goes_on_doing_so():
    """As under nohup."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.came
        assert signal.SIGHUP not in stop_signals()
    finally:
        signal.signal(signal.SIGHUP, old)

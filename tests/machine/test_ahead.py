"""Stages in threads: order, errors in their place, bounded queues, and an end when nobody reads any more."""
import threading
import time

import pytest

from machine.ahead import MOST, ahead


def test_items_come_in_order_through_several_stages():
    assert list(ahead(item + 1 for item in ahead(iter(range(100))))) == list(range(1, 101))
    assert list(ahead(iter(()))) == []


def test_a_stage_works_in_its_own_thread_and_only_a_few_items_ahead():
    threads, made = set(), []

    def items():
        for number in range(50):
            threads.add(threading.get_ident())
            made.append(number)
            yield number

    found = ahead(items())
    assert next(found) == 0
    time.sleep(0.3)
    # One that was read, MOST that wait, and one that waits to be put among them.
    assert len(made) == MOST + 2 and threads == threads - {threading.get_ident()}
    assert list(found) == list(range(1, 50))


def test_an_error_is_raised_where_it_happened_and_a_reader_that_stops_ends_the_stages():
    def failing():
        yield 1
        raise KeyError("two")

    found = ahead(ahead(failing()))
    assert next(found) == 1
    with pytest.raises(KeyError, match="two"):
        next(found)
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    found = ahead(ahead(endless()))
    assert next(found) == 0
    found.close()
    assert closed.wait(5)

"""Items made ahead by a thread: in order, no more than requested, and with their errors in place."""

import threading
import time

import pytest

from colossal_llama2.dataset.read.prefetch import prefetched


def threads() -> int:
    return threading.active_count()


def test_items_come_in_order_and_the_thread_ends():
    before = threads()
    assert list(prefetched(range(50), depth=3)) == list(range(50))
    assert threads() == before


def test_no_more_is_made_than_requested():
    made = []

    def items():
        for number in range(100):
            made.append(number)
            yield number

    ahead = prefetched(items(), depth=2)
    assert next(ahead) == 0
    time.sleep(0.3)
    # Two wait, and the thread holds one more.
    assert len(made) <= 1 + 2 + 1
    before = threads()
    ahead.close()
    assert threads() == before - 1


def test_an_error_is_raised_in_place_of_its_item():
    def items():
        yield 1
        raise KeyError("second")

    ahead = prefetched(items())
    assert next(ahead) == 1
    with pytest.raises(KeyError, match="second"):
        next(ahead)

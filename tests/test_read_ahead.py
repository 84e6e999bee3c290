"""Reading ahead changes neither the items nor where their errors come, and goes no further than it is told."""

import threading
from contextlib import closing

import pytest

from yxanul_nemo.read_ahead import read_ahead


@pytest.mark.parametrize("depth", [0, 1, 5, 100])
def test_the_same_items(depth):
    assert list(read_ahead(iter(range(20)), depth)) == list(range(20))
    assert list(read_ahead(iter([]), depth)) == []


def test_items_are_made_while_one_is_used_and_no_more_than_the_depth():
    made, third_is_made = [], threading.Event()

    def items():
        for i in range(10):
            made.append(i)
            if i == 2:
                third_is_made.set()
            yield i

    with closing(read_ahead(items(), depth=2)) as ahead:
        assert next(ahead) == 0
        assert third_is_made.wait(30)
    assert made == [0, 1, 2], "closing ends the making"


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise OSError("disk")

    ahead, seen = read_ahead(items(), depth=5), []
    with pytest.raises(OSError, match="disk"):
        for item in ahead:
            seen.append(item)
    assert seen == [1, 2]

"""Items made in a thread while those before them are used."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def read_ahead[T](items: Iterator[T], depth: int) -> Generator[T]:
    """The same items, up to `depth` of them made before they are asked for; an error comes where its item would have come.

    Close the generator (`contextlib.closing`) to wait for the item that is being made and to make no further ones.
    """
    end = object()
    coming: deque[Future[Any]] = deque()
    thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        while True:
            while len(coming) <= depth:
                coming.append(thread.submit(next, items, end))
            if (item := coming.popleft().result()) is end:
                return
            yield item
    finally:
        thread.shutdown(wait=True, cancel_futures=True)

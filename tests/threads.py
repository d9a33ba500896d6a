"""Threads for tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


def together(tasks: Sequence[Callable[[], None]]) -> None:
    """All at once, each in a thread of its own; the first error is raised."""
    barrier, errors = threading.Barrier(len(tasks)), []

    def run(task: Callable[[], None]) -> None:
        barrier.wait()
        try:
            task()
        except BaseException as error:  # handed on below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]

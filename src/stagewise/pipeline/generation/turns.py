"""Parts of the prompts that take turns, so that ranks compute at the same time.

Problem: a token needs all ranks one after another, and `generate` is a loop that calls the model
from within. Idea: each part of the prompts, a lane, has a loop and a cache of its own, in a thread
of which one runs at a time. Where a lane would wait for its token, the next has its turn, in an
order that is the same on all ranks.
"""

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class _Ended(BaseException):
    """Another lane has failed."""


class Turns:
    """Runs tasks of which one has its turn at a time; each calls `pass_on` where it would wait."""

    def __init__(self) -> None:
        self._left: list[int] = []
        self._turn: list[threading.Lock] = []
        self._now = 0
        self._error: BaseException | None = None

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Return the tasks' results; raise the first error. A single one runs in this thread."""
        if len(tasks) == 1:
            self._left = [0]
            return [tasks[0]()]
        results: dict[int, T] = {}
        self._left = [*range(len(tasks))]
        self._turn = [threading.Lock() for _ in tasks]
        for lock in self._turn:
            lock.acquire()

        def run_one(number: int) -> None:
            self._turn[number].acquire()
            try:
                if self._error is None:
                    results[number] = tasks[number]()
            except _Ended:
                pass
            except BaseException as error:
                self._error = self._error or error
            after = self._next(number)
            self._left.remove(number)
            if self._left:
                self._start(after)

        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(run_one, number))
            for number in self._left
        ]
        for thread in threads:
            thread.start()
        self._start(0)
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return [results[number] for number in range(len(tasks))]

    def pass_on(self) -> None:
        """Let the other tasks have their turns; return when it is this one's again."""
        mine = self._now
        if len(self._left) > 1:
            self._start(self._next(mine))
            self._turn[mine].acquire()
            if self._error is not None:
                raise _Ended

    def _next(self, number: int) -> int:
        return next((other for other in self._left if other > number), self._left[0])

    def _start(self, number: int) -> None:
        self._now = number
        self._turn[number].release()

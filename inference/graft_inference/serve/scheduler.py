"""Who is decoded next: one thread owns engine and tokenizer, and answers take turns round by round."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue

from ..engine import GraftEngine
from ..errors import GraftError
from .answer import Answer, Limits

PATIENCE = 10.0
"""Seconds that the end of the server waits for a round."""
ENDING = "the server ends"
LOG = logging.getLogger("graft_inference.serve")


class Overloaded(Exception):
    """No more requests may wait, or the server is shutting down."""


class Scheduler:
    """Computes answers, several at a time. None depends on the others.

    Args:
        method: one of `policy.METHODS`.
        at_most: most answers under way, each with caches of its own.
        waiting: most requests that wait beside them.
        ended: called with every answer that has ended, in whatever way.
    """

    def __init__(
        self,
        engine: GraftEngine,
        method: str,
        limits: Limits,
        at_most: int,
        waiting: int,
        ended: Callable[[Answer], None],
    ) -> None:
        self.engine = engine
        self.method = method
        self.limits = limits
        self.at_most = at_most
        self.running = 0
        self.unfinished = 0
        self._most = at_most + waiting
        self._ended = ended
        self._has_ended = False
        self._arrivals: SimpleQueue[Answer | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="graft-serve", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Takes on no more, and ends all answers after the round under way.

        A signal may call it in the middle of `submit`, whose thread holds the lock: it takes none.
        """
        self._has_ended = True
        self._arrivals.put(None)

    def join(self) -> None:
        """Returns when all answers have ended, or a round takes too long."""
        self._thread.join(PATIENCE)

    def submit(self, answer: Answer) -> None:
        """Raises Overloaded where no more may wait."""
        with self._lock:
            if self._has_ended:
                raise Overloaded(ENDING)
            if self.unfinished >= self._most:
                raise Overloaded(f"{self.unfinished} requests are under way or wait, and no more may; ask again later")
            self.unfinished += 1
        self._arrivals.put(answer)

    def _run(self) -> None:
        waiting: deque[Answer] = deque()
        running: list[Answer] = []
        while True:
            arrived = self._arrived(waits=not waiting and not running)
            if self._has_ended:
                self._refuse_all([*running, *waiting, *arrived])
                return
            for answer in filter(None, arrived):
                # Before it waits, so that what cannot be answered is refused at once.
                if self._goes_on(answer, partial(answer.begin, self.engine, self.method, self.limits)):
                    waiting.append(answer)
            waiting = deque(answer for answer in waiting if self._goes_on(answer, lambda: True))
            while waiting and len(running) < self.at_most:
                running.append(waiting.popleft())
            self.running = len(running)
            running = [answer for answer in running if self._goes_on(answer, answer.advance)]
            self.running = len(running)

    def _refuse_all(self, left: list[Answer | None]) -> None:
        """Also those that were counted before the end was known, and come after it."""
        while True:
            for answer in filter(None, left):
                self._goes_on(answer, _refuse)
            with self._lock:
                if not self.unfinished:
                    return
            left = [self._arrivals.get()]

    def _arrived(self, waits: bool) -> list[Answer | None]:
        found = [self._arrivals.get()] if waits else []
        while True:
            try:
                found.append(self._arrivals.get_nowait())
            except Empty:
                return found

    def _goes_on(self, answer: Answer, part: Callable[[], bool]) -> bool:
        """Runs a part of an answer; an error ends that answer alone. Returns whether there is more to do."""
        try:
            if not answer.is_cancelled and part():
                return True
        except Exception as error:
            if not isinstance(error, GraftError | Overloaded):
                LOG.exception("a request failed")
            answer.fail(error)
        with self._lock:
            self.unfinished -= 1
        # Counted before it is told, so that whoever has the answer finds it counted.
        for part_of_end in (answer.close, partial(self._ended, answer)):
            try:
                part_of_end()
            except Exception:
                LOG.exception("a request did not end in good order")
        answer.tell(None)
        return False


def _refuse() -> bool:
    raise Overloaded(ENDING)

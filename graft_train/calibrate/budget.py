"""The minutes that a calibration may take."""

import time

from graft_train.processes import of_main

TRACES, TABLE = 0.4, 0.2
"""Shares of the minutes for traces and for the latency table; the race has what they leave."""


class Budget:
    """Seconds from now on. All processes go by the main one's clock, and so decide alike."""

    def __init__(self, seconds: float) -> None:
        self._start, self._seconds = time.monotonic(), seconds

    @property
    def spent(self) -> float:
        """Seconds since it began. All processes must ask together."""
        return float(of_main(time.monotonic() - self._start))

    @property
    def left(self) -> float:
        """Seconds that are left, below 0 when it is overdrawn. All processes must ask together."""
        return self._seconds - self.spent

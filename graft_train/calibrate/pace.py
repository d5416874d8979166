"""How fast the device is while plans race, as against when its latency table was made."""

from itertools import cycle

import numpy as np

from graft_train.calibrate.rounds import mean_ms, undisturbed
from graft_train.calibrate.timer import RoundTimer
from graft_train.steadiness import variation


class Pace:
    """Samples plain decoding and the widest verification in turn, always the same work.

    The one waits for memory most, the other for arithmetic.

    Attributes:
        milliseconds: of a round, by rows: every sample.
    """

    def __init__(self, timer: RoundTimer) -> None:
        self.timer = timer
        self.milliseconds: dict[int, list[float]] = {timer.num_draft_tokens[0]: [], timer.num_draft_tokens[-1]: []}
        self._turns = cycle(self.milliseconds)

    def probe(self) -> None:
        """One more sample; of a prompt that ends at once there is none."""
        rows = next(self._turns)
        found = self.timer.timed(("short", ("nodes", rows)), 0)
        if found:
            self.milliseconds[rows].append(mean_ms(found))

    @property
    def factor(self) -> float:
        """The table's times this often are those of the race; 1 where nothing was sampled."""
        slowness = [
            np.log(time / undisturbed(self.timer.samples["short", ("nodes", rows)]))
            for rows, times in self.milliseconds.items()
            for time in times
        ]
        return float(np.exp(np.mean(slowness))) if slowness else 1.0

    @property
    def variation(self) -> float:
        """How much the same work's time varied within the race."""
        return variation(self.milliseconds.values())

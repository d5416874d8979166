"""Who is left in a race, and how fast everyone is, from the times of its laps.

A lap is one prompt, continued by every plan that is left. The logarithm of the time that a plan took over the time
that its replay foretold is modelled as the plan's own effect + the lap's + noise: a randomised block design, laps
being the blocks. What prompts differ in is in the replay, and what slows the machine down for a while is in the lap,
so that a few laps tell plans apart. A hiccup within a lap is cut down to what is usual.

What is foretold is wrong by some per cent, and what is measured by its noise. The two are weighed as normal errors are:
on a machine where a few laps say nothing, plans are chosen by their replay.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

LEAST_LAPS = 3
"""Before anything is concluded."""
ERROR = 0.05
"""How wrong replays were of plans, by a table of latencies without noise: the logarithm's standard deviation."""
ALPHA = 0.05
"""Chance that any plan drops out wrongly, over all plans and looks."""
USUAL = 3 * 1.4826
"""Of the noise's median absolute deviation: three standard deviations, if it is normal."""
WORTH = 0.01
"""A plan that cannot be faster than the leader by this share has nothing to win."""


class Run(NamedTuple):
    """One continuation: tokens after the first, the seconds and the rounds they took."""

    tokens: int
    seconds: float
    rounds: int


@dataclass
class Lap:
    """Runs of one prompt, whose place among the prompts is `place`."""

    place: int
    runs: dict[str, Run]


class Standings:
    """A race with elimination, after each of its laps.

    Args:
        foretold: seconds that each plan takes for each prompt by its replay, [prompts]. Only ratios count.
        error: standard deviation of the logarithm of how wrong they are of a plan.

    Attributes:
        laps: those in which anything was decoded.
        dropped: the lap after which each plan that is out was dropped.
    """

    def __init__(self, foretold: dict[str, np.ndarray], error: float = ERROR) -> None:
        self.foretold, self.error = foretold, error
        self.laps: list[Lap] = []
        self.dropped: dict[str, int] = {}

    @property
    def left(self) -> list[str]:
        return [name for name in self.foretold if name not in self.dropped]

    @property
    def leader(self) -> str:
        """The fastest of those left, as far as is known; all of them have run every lap."""
        slowness_PL = self._slowness(self.left, self.laps)
        wrong_P = slowness_PL.mean(axis=1) - slowness_PL.mean()
        return self.left[int((self._whole(self.left) + self._weight(_noise(slowness_PL)) * wrong_P).argmin())]

    def add(self, lap: Lap) -> None:
        """One more lap of all plans left; drops those that, as far as it and those before tell, cannot win."""
        if not all(run.seconds and self.foretold[name][lap.place] for name, run in lap.runs.items()):
            return  # the target ended the prompt at once
        self.laps.append(lap)
        looks = len(self.laps) - LEAST_LAPS + 1
        if looks < 1 or len(self.left) < 2:
            return
        # sum of 1 / (k (k + 1)) over all looks k is 1
        alpha = ALPHA / (looks * (looks + 1)) / (len(self.left) - 1)
        hopeless = [name for name in self.left if name != self.leader and self._most(name, alpha) < WORTH]
        self.dropped |= dict.fromkeys(hopeless, len(self.laps))

    def ran(self, name: str) -> list[Lap]:
        """The laps of one plan."""
        return self.laps[: self.dropped.get(name)]

    def seconds(self, name: str) -> float:
        """What all prompts together would take this plan, at the speed that the machine had over the whole race.

        Of a plan that dropped out, by its ratio to the leader over the laps that it ran.
        """
        leader = self.leader
        slowness = np.mean([_slowness(lap, leader, self.foretold) for lap in self.laps])
        return float(self.foretold[leader].sum() * np.exp(slowness - self.ratio(name)[0]))

    def ratio(self, name: str) -> tuple[float, float, float]:
        """log of this plan's speed over the leader's as measured, and its 95 % interval, over the laps both ran."""
        gains_L = self._gains(name)[0]
        middle = self._foretold_lead(name) + float(gains_L.mean())
        if name == self.leader:
            return middle, middle, middle
        error = gains_L.std(ddof=1) / np.sqrt(len(gains_L)) * student.ppf(0.975, len(gains_L) - 1)
        return middle, middle - float(error), middle + float(error)

    def lead(self, name: str) -> tuple[float, float]:
        """log of this plan's speed over the leader's, foretold and measured weighed, and its standard error."""
        gains_L, variance = self._gains(name)
        weight = self._weight(variance)
        middle = self._foretold_lead(name) + weight * float(gains_L.mean())
        return middle, float(np.sqrt(2 * self.error**2 * (1 - weight)))

    def _most(self, name: str, alpha: float) -> float:
        """log of the most by which a plan that is left may be faster than the leader, wrong with chance alpha."""
        middle, error = self.lead(name)
        return middle + error * float(student.ppf(1 - alpha, (len(self.left) - 1) * (len(self.laps) - 1)))

    def _weight(self, variance: float) -> float:
        """Of what was measured, where the mean over laps has this variance, against what was foretold."""
        return self.error**2 / (self.error**2 + variance)

    def _gains(self, name: str) -> tuple[np.ndarray, float]:
        """log of how far a plan beat the leader beyond what was foretold, [L]; variance of a plan's mean over laps."""
        names = self.left if name in self.left else [self.leader, name]
        slowness_PL = self._slowness(names, self.ran(name))
        gains_L = slowness_PL[names.index(self.leader)] - slowness_PL[names.index(name)]
        # A plan that its replay foretells badly varies more than the others do.
        own = gains_L.var(ddof=1) / 2 / len(gains_L) if len(gains_L) > 1 else 0.0
        return gains_L, max(_noise(slowness_PL), own)

    def _foretold_lead(self, name: str) -> float:
        leader, own = self._whole([self.leader, name])
        return float(leader - own)

    def _whole(self, names: list[str]) -> np.ndarray:
        """log of the seconds foretold of all prompts together, [P]."""
        return np.log([self.foretold[name].sum() for name in names])

    def _slowness(self, names: list[str], laps: list[Lap]) -> np.ndarray:
        """log of measured over foretold seconds, the lap's own taken away, without hiccups, [P, L]."""
        slowness_PL = np.array([[_slowness(lap, name, self.foretold) for lap in laps] for name in names])
        slowness_PL -= np.median(slowness_PL, axis=0)
        usual_P1 = np.median(slowness_PL, axis=1, keepdims=True)
        noise_PL = slowness_PL - usual_P1
        # By what is usual of all plans, as a few laps of one say little; but some vary more than the others do.
        most_P1 = USUAL * np.median(np.abs(noise_PL), axis=1, keepdims=True).clip(np.median(np.abs(noise_PL)))
        return usual_P1 + noise_PL.clip(-most_P1, most_P1)


def _noise(slowness_PL: np.ndarray) -> float:
    """Variance of a plan's mean over laps: the noise is what is neither the plan's own nor the lap's."""
    plans, laps = slowness_PL.shape
    if plans < 2 or laps < 2:
        return np.inf
    noise_PL = slowness_PL - slowness_PL.mean(axis=0) - slowness_PL.mean(axis=1, keepdims=True) + slowness_PL.mean()
    return float((noise_PL**2).sum() / ((plans - 1) * (laps - 1)) / laps)


def _slowness(lap: Lap, name: str, foretold: dict[str, np.ndarray]) -> float:
    """log of measured over foretold seconds."""
    return float(np.log(lap.runs[name].seconds / foretold[name][lap.place]))

"""Never much slower than autoregressive: plans that do not pay are left for narrower ones, and for none at all.

Everything is counted in tokens' worth of autoregressive time. A round that takes longer than its tokens would have
taken one by one is a loss. Losses come out of a purse that every emitted token feeds a little, so that whatever
happens n tokens take at most (1 + SHARE) * n + PURSE tokens' worth of time, a first round of every plan, and one
round more. What a round takes beyond OUTLIER times its plan's median is the machine's doing, and counts for no plan.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import median

from .policy import AUTOREGRESSIVE, Plan

SHARE = 0.02
"""Of the autoregressive time, what may be lost in the long run."""
GRANT, PURSE = 8.0, 16.0
"""Tokens' worth that may be lost at the start, and at any one time."""
STAKE, SLACK = 3.0, 16.0
"""What one plan may lose before the next has its turn, and how far earlier gains make up for it."""
WAIT, LONGEST_WAIT = 64, 512
"""Tokens until a plan that failed is tried again; doubled each time."""
AS_PLANNED, MEASURED, STOPPED = "plan", "autoregressive, measured", "autoregressive, nothing else pays"
"""Why a round has its plan; the other reasons are the names of narrower plans."""
PLAIN_ROUNDS = 3
PLAIN_EVERY, PLAIN_IN_DOUBT = 64, 8
"""Rounds after which one of them is plain, to time it anew; fewer where the plan is not far from failing."""
OUTLIER = 2.0
FADE = 0.98
"""Weight that a round keeps in a plan's speed at each later one."""


@cache
def ladder(plan: Plan) -> dict[str, Plan]:
    """The plan, what it can be narrowed to, and decoding without speculation, by name."""
    rungs: dict[str, Plan | None] = {AS_PLANNED: plan, "narrowed": plan.narrowed()}
    if plan.drafts and plan.retrieves:
        rungs["retrieval alone"] = plan.without_drafting()
    found = {name: rung for name, rung in rungs.items() if rung is not None}
    return found | {"autoregressive": AUTOREGRESSIVE}


@dataclass
class Rung:
    """How one plan has done.

    Attributes:
        standing: what it won (negative: lost) in its present trial.
        is_new: its trial has not begun: the first round, which may have to catch up, will not be judged.
        wait, until: tokens that it rests after failing, and the place until which it does.
        spent, earned: its faded time and tokens.
        seconds: of its last rounds, trials before this one included.
    """

    standing: float = 0.0
    is_new: bool = True
    wait: int = WAIT
    until: int = 0
    spent: float = 0.0
    earned: float = 0.0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=9))

    @property
    def speed(self) -> float:
        """Times the autoregressive one; 0 while it rests or was never judged."""
        return 0.0 if self.is_new or not self.spent else self.earned / self.spent


class Governor:
    """Chooses the plan of each round from what the rounds before it took.

    The processes of one tensor-parallel target decide alike because `agree` gives all of them the same times.

    Args:
        rungs: names of the plans, the widest first, the last one without speculation.
        agree: seconds measured here -> seconds to go by.
    """

    def __init__(self, rungs: Sequence[str], agree: Callable[[float], float] = float) -> None:
        self.names = tuple(rungs)
        self.rungs = [Rung() for _ in self.names[:-1]]
        self.purse = GRANT
        self.emitted = 0
        self._agree = agree
        # Seconds per token of the last plain rounds, by the context's power of two.
        self._plain: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=5))
        self._size = 0
        self._chosen = 0
        # Rounds since a plain one; of those not judged yet: whose they are, their time and their tokens.
        self._since, self._open, self._seconds, self._tokens = 0, 0, 0.0, 0

    def choose(self, context: int) -> tuple[int, str]:
        """The place of the next round's plan, and why, in words.

        Args:
            context: committed tokens.
        """
        if self._tokens and self._size != context.bit_length():
            self._settle(self._plain[self._size][-1])
        self._size = context.bit_length()
        self._chosen, plain = self._best(), len(self.rungs)
        if self._wants_plain():
            self._chosen = plain
            return plain, MEASURED
        return self._chosen, STOPPED if self._chosen == plain else self.names[self._chosen]

    def _wants_plain(self) -> bool:
        """Whether it is time for a plain round: by the clock, or because what was chosen seems to lose."""
        times = self._plain[self._size]
        if not times or sum(map(len, self._plain.values())) < PLAIN_ROUNDS:
            return True
        if self._chosen == len(self.rungs):
            return False
        sure = self.rungs[self._chosen].standing > SLACK / 2
        loses = self._tokens - self._seconds / times[-1] < -STAKE
        return loses or self._since >= (PLAIN_EVERY if sure else PLAIN_IN_DOUBT)

    def _best(self) -> int:
        """The widest plan that pays so far, unless one that is wider still has its turn: the longest rested first."""
        may = [place for place, rung in enumerate(self.rungs) if self._may(rung)]
        best = min((place for place in may if not self.rungs[place].is_new), default=len(self.rungs))
        rested = [place for place in may if place < best]
        return min(rested, key=lambda place: self.rungs[place].until, default=best)

    def _may(self, rung: Rung) -> bool:
        return self.emitted >= rung.until and self.purse > (STAKE if rung.is_new else 0.0)

    def record(self, seconds: float, tokens: int) -> None:
        """Tells what the round just chosen took and emitted."""
        seconds = self._agree(seconds)
        self.emitted += tokens
        self.purse = min(self.purse + SHARE * tokens, PURSE)
        times = self._plain[self._size]
        if self._chosen == len(self.rungs):
            found = seconds / tokens
            times.append(min(found, OUTLIER * median(times)) if times else found)
            # The machine may have become slower meanwhile: the rounds between two plain ones are judged by both.
            self._settle((times[-1] + times[max(-2, -len(times))]) / 2)
            self._since = 0
            return
        if self._chosen != self._open:
            self._settle(times[-1])
            self._open = self._chosen
        self._since += 1
        rung = self.rungs[self._chosen]
        is_first = not rung.seconds  # nothing says whether it took its usual time
        rung.seconds.append(seconds)
        if is_first:
            return
        seconds = min(seconds, OUTLIER * median(rung.seconds))
        if rung.is_new:
            rung.is_new = False
            self.purse += tokens - seconds / times[-1]
            return
        self._seconds += seconds
        self._tokens += tokens

    def _settle(self, plain: float) -> None:
        """Judges the rounds not judged yet by this time of a plain round."""
        if self._tokens:
            spent, tokens = self._seconds / plain, self._tokens
            self._seconds, self._tokens = 0.0, 0
            self.purse = min(self.purse + tokens - spent, PURSE)
            self._judge(self._open, spent, tokens)

    def _judge(self, place: int, spent: float, tokens: int) -> None:
        """Against autoregressive, or a narrower plan that is faster."""
        rung = self.rungs[place]
        rung.spent, rung.earned = FADE * rung.spent + spent, FADE * rung.earned + tokens
        fallback = max([1.0, *(narrower.speed for narrower in self.rungs[place + 1 :])])
        rung.standing = min(rung.standing + tokens - spent * fallback, SLACK)
        if rung.standing >= SLACK:
            rung.wait = WAIT
        elif rung.standing < -STAKE:
            wait = min(2 * rung.wait, LONGEST_WAIT)
            self.rungs[place] = Rung(wait=wait, until=self.emitted + rung.wait, seconds=rung.seconds)


Governors = dict[Plan, dict[int, Governor]]
"""By the plan that is governed, looked up once a request, and the bit length of how many prompts are decoded."""

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
GRANT, PURSE = 12.0, 16.0
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
        # Seconds per token of the last plain rounds, and the rounds since, by the context's power of two.
        self._plain: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=5))
        self._since: defaultdict[int, int] = defaultdict(int)
        self._size = 0
        self._chosen = 0

    def choose(self, context: int) -> tuple[int, str]:
        """The place of the next round's plan, and why, in words.

        Args:
            context: committed tokens.
        """
        self._size = context.bit_length()
        plain = len(self.names) - 1
        wanted = 1 if any(times for size, times in self._plain.items() if size != self._size) else PLAIN_ROUNDS
        self._chosen = self._best()
        sure = self._chosen < plain and self.rungs[self._chosen].standing > SLACK / 2
        every = PLAIN_EVERY if sure else PLAIN_IN_DOUBT
        if len(self._plain[self._size]) < wanted or self._since[self._size] >= every:
            self._chosen = plain
            return plain, MEASURED
        return self._chosen, STOPPED if self._chosen == plain else self.names[self._chosen]

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
        if self._chosen == len(self.rungs):
            self._plain[self._size].append(seconds / tokens)
            self._since[self._size] = 0
            return
        self._since[self._size] += 1
        usual = self.rungs[self._chosen].seconds
        is_first = not usual  # nothing says whether it took its usual time
        usual.append(seconds)
        if not is_first:
            spent = min(seconds, OUTLIER * median(usual)) / median(self._plain[self._size])
            self.purse = min(self.purse + tokens - spent, PURSE)
            self._judge(self._chosen, spent, tokens)

    def _judge(self, place: int, spent: float, tokens: int) -> None:
        """Against autoregressive, or a narrower plan that is faster."""
        rung = self.rungs[place]
        if rung.is_new:
            rung.is_new = False
            return
        rung.spent, rung.earned = FADE * rung.spent + spent, FADE * rung.earned + tokens
        fallback = max([1.0, *(narrower.speed for narrower in self.rungs[place + 1 :])])
        rung.standing = min(rung.standing + tokens - spent * fallback, SLACK)
        if rung.standing >= SLACK:
            rung.wait = WAIT
        elif rung.standing < -STAKE:
            wait = min(2 * rung.wait, LONGEST_WAIT)
            self.rungs[place] = Rung(wait=wait, until=self.emitted + rung.wait, seconds=rung.seconds)

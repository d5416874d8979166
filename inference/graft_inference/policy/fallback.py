"""The fallback: a plan that loses time is replaced by a narrower one, and in the end by plain decoding.

The unit of time is the time that plain decoding takes for a token. A round that takes longer than its tokens would have
taken one by one is a loss. Losses are paid from a loss budget, to which every emitted token adds a little. So n tokens
take at most (1 + SHARE) * n + LOSS_BUDGET units, plus a first round of every plan and one more round, whatever happens.
The time of a round beyond OUTLIER times its plan's median is blamed on the machine, and counts for no plan.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import median

from .plan import AUTOREGRESSIVE, Plan

SHARE = 0.02
"""Of the autoregressive time, what may be lost in the long run."""
GRANT, LOSS_BUDGET = 8.0, 16.0
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
def fallback_plans(plan: Plan) -> dict[str, Plan]:
    """The plan, its narrower versions, and plain decoding, by name and from wide to narrow."""
    levels: dict[str, Plan | None] = {AS_PLANNED: plan, "narrowed": plan.narrowed()}
    if plan.drafts and plan.sources:
        levels["retrieval alone"] = plan.without_drafting()
    found = {name: level for name, level in levels.items() if level is not None}
    return found | {"autoregressive": AUTOREGRESSIVE}


@dataclass
class Level:
    """How well one plan has done.

    Attributes:
        standing: units of time won (negative: lost) in its present trial.
        is_new: whether its trial has not begun. The first round is not judged, as the head may have to catch up.
        wait, until: for how many tokens it is not tried after it failed, and up to which number of emitted tokens.
        spent, earned: time and tokens of its rounds, of which later ones weigh more.
        seconds: of its last rounds, those of earlier trials included.
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
        """Speed over plain decoding's; 0 while it is not tried or was never judged."""
        return 0.0 if self.is_new or not self.spent else self.earned / self.spent


class Fallback:
    """Chooses the plan of each round by the time that earlier rounds took.

    The processes of one tensor-parallel target decide alike because `agree` gives all of them the same times.

    Args:
        levels: names of the plans, the widest first, plain decoding last.
        agree: takes the seconds measured here, and returns those that all processes go by.
    """

    def __init__(self, levels: Sequence[str], agree: Callable[[float], float] = float) -> None:
        self.names = tuple(levels)
        self.levels = [Level() for _ in self.names[:-1]]
        self.loss_budget = GRANT
        self.emitted = 0
        self._agree = agree
        # Seconds per token of the last plain rounds, by the context's power of two.
        self._plain: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=5))
        self._size = 0
        self._chosen = 0
        # Rounds since a plain one; of those not judged yet: whose they are, their time and their tokens.
        self._since, self._open, self._seconds, self._tokens = 0, 0, 0.0, 0

    def choose(self, context: int) -> tuple[int, str]:
        """Index of the next round's plan among the levels, and the reason in words.

        Args:
            context: number of committed tokens.
        """
        if self._tokens and self._size != context.bit_length():
            self._settle(self._plain[self._size][-1])
        self._size = context.bit_length()
        self._chosen, plain = self._best(), len(self.levels)
        if self._wants_plain():
            self._chosen = plain
            return plain, MEASURED
        return self._chosen, STOPPED if self._chosen == plain else self.names[self._chosen]

    def _wants_plain(self) -> bool:
        """Whether it is time for a plain round: by the clock, or because what was chosen seems to lose."""
        times = self._plain[self._size]
        if not times or sum(map(len, self._plain.values())) < PLAIN_ROUNDS:
            return True
        if self._chosen == len(self.levels):
            return False
        sure = self.levels[self._chosen].standing > SLACK / 2
        loses = self._tokens - self._seconds / times[-1] < -STAKE
        return loses or self._since >= (PLAIN_EVERY if sure else PLAIN_IN_DOUBT)

    def _best(self) -> int:
        """The widest plan that pays so far, unless one that is wider still has its turn: the longest rested first."""
        may = [place for place, level in enumerate(self.levels) if self._may(level)]
        best = min((place for place in may if not self.levels[place].is_new), default=len(self.levels))
        rested = [place for place in may if place < best]
        return min(rested, key=lambda place: self.levels[place].until, default=best)

    def _may(self, level: Level) -> bool:
        return self.emitted >= level.until and self.loss_budget > (STAKE if level.is_new else 0.0)

    def record(self, seconds: float, tokens: int) -> None:
        """Takes in the seconds and the number of emitted tokens of the round that was just chosen."""
        seconds = self._agree(seconds)
        self.emitted += tokens
        self.loss_budget = min(self.loss_budget + SHARE * tokens, LOSS_BUDGET)
        times = self._plain[self._size]
        if self._chosen == len(self.levels):
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
        level = self.levels[self._chosen]
        is_first = not level.seconds  # nothing says whether it took its usual time
        level.seconds.append(seconds)
        if is_first:
            return
        seconds = min(seconds, OUTLIER * median(level.seconds))
        if level.is_new:
            level.is_new = False
            self.loss_budget += tokens - seconds / times[-1]
            return
        self._seconds += seconds
        self._tokens += tokens

    def _settle(self, plain: float) -> None:
        """Judges the rounds not judged yet by this time of a plain round."""
        if self._tokens:
            spent, tokens = self._seconds / plain, self._tokens
            self._seconds, self._tokens = 0.0, 0
            self.loss_budget = min(self.loss_budget + tokens - spent, LOSS_BUDGET)
            self._judge(self._open, spent, tokens)

    def _judge(self, place: int, spent: float, tokens: int) -> None:
        """Against autoregressive, or a narrower plan that is faster."""
        level = self.levels[place]
        level.spent, level.earned = FADE * level.spent + spent, FADE * level.earned + tokens
        fallback = max([1.0, *(narrower.speed for narrower in self.levels[place + 1 :])])
        level.standing = min(level.standing + tokens - spent * fallback, SLACK)
        if level.standing >= SLACK:
            level.wait = WAIT
        elif level.standing < -STAKE:
            wait = min(2 * level.wait, LONGEST_WAIT)
            self.levels[place] = Level(wait=wait, until=self.emitted + level.wait, seconds=level.seconds)


Fallbacks = dict[Plan, dict[int, Fallback]]
"""By the plan that may fall back, looked up once a request, and the bit length of how many prompts are decoded."""

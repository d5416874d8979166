"""Times rounds of an engine: plans that leave no choice, on real prompts, until their times are known."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import cycle
from statistics import median

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from scipy.stats import sem
from torch import Tensor

from graft_inference import (
    AcceptanceModel,
    Checkpoint,
    GenerationStats,
    GraftEngine,
    GraftError,
    Plan,
    ScoredPlan,
    SourceModel,
)
from graft_inference.retrieval.sources import SOURCES
from graft_inference.stats import PHASES
from graft_inference.steadiness import variation
from graft_inference.template import RankPaths
from graft_inference.tree import drafted_nodes
from graft_train.calibrate.budget import Budget
from graft_train.calibrate.latency import Latency
from graft_train.calibrate.rounds import Sample, between, mean_ms, undisturbed, whole_ms
from graft_train.processes import of_main, say

SAMPLE, WARM_UP = 12, 2
"""Tokens of one sample, and of the run of each plan that comes before them, without CUDA graphs."""
MOST_SAMPLES = 32
SURE, SURE_SAMPLES = 0.02, 3
"""Standard error of a plan's mean, relative to it, at which it needs no more samples, of which there are some."""
UNKNOWN = 0.05
"""What the error of a single sample is taken to be."""
MISFIT = 0.03
"""Where a time is so far, relative to it, from times that rise with the work, the table contradicts itself."""
AGAIN, MORE = 3, 3
"""How often it is measured again then, and samples of every plan each time."""


class RoundTimer:
    """Times forced plans on real prompts, interleaved, after a warm-up of each.

    Args:
        temperature: of the draws, which take longer than the likeliest tokens do.
        templates: rank paths that each source is asked for, by its name.
        longest: tokens of the longest text that plans will meet.
    """

    def __init__(
        self,
        engine: GraftEngine,
        prompts: list[Tensor],
        num_draft_tokens: list[int],
        topk: int,
        num_steps: int,
        temperature: float,
        templates: dict[str, RankPaths],
        longest: int,
    ) -> None:
        self.engine, self.prompts, self.temperature = engine, prompts, temperature
        most = 1 + drafted_nodes(topk, num_steps) + sum(map(len, templates.values()))
        self.num_draft_tokens = sorted({1, *(nodes for nodes in num_draft_tokens if nodes <= most)})
        self.num_steps = num_steps
        self.plans = _forced_plans(self.num_draft_tokens, topk, num_steps, templates)
        self.contexts = _contexts(prompts, min(longest, engine.target.max_positions - SAMPLE))
        runs = [("long", key) for key in self.plans if key[0] == "nodes"] if len(self.contexts) > 1 else []
        runs = [("short", key) for key in self.plans] + runs
        self.samples: dict[tuple[str, tuple[str, int]], list[Sample]] = {run: [] for run in runs}
        self.sweeps = 0
        if engine.captured is not None:
            # Graphs go where a deeper tree or a longer text comes: the deepest and the longest first.
            text = self.contexts.get("long", prompts[0])
            engine.generate(text, SAMPLE, temperature, plan=self.plans["gate", 1], seed=0)
        for run in runs:
            self.timed(run, 0, WARM_UP if engine.captured is None else SAMPLE)

    def measure(self, budget: Budget) -> None:
        """Fills the table. One that contradicts itself gets more samples, some times over, whatever they take."""
        self.fill(budget)
        for _ in range(AGAIN):
            if not self.contradicts():
                return
            say("calibrate: the latency table contradicts itself, and is measured again")
            self.fill(Budget(0), MORE + min(map(len, self.samples.values())))

    def fill(self, budget: Budget, least: int = 1) -> None:
        """Samples all plans in turn until each mean is known or the budget is spent, but each plan so often."""
        for _ in range(MOST_SAMPLES):
            few = any(len(found) < least for found in self.samples.values())
            if not few and (all(map(_is_sure, self.samples.values())) or budget.left <= 0):
                return
            for run in self.samples if self.sweeps % 2 else reversed(self.samples):
                ended = not self.samples[run] and self.sweeps >= len(self.prompts)  # every prompt, at once
                if not ended and (len(self.samples[run]) < least or budget.left > 0):
                    found = self.timed(run, self.sweeps)
                    self.samples[run] += [found] if found else []
            self.sweeps += 1

    def timed(self, run: tuple[str, tuple[str, int]], number: int, tokens: int = SAMPLE) -> Sample:
        """Milliseconds of each round by phase, once; none where the target ended the prompt at once.

        A GPU tells its times at the end alone: there it is one round, the mean.

        Args:
            number: whose turn it is among the prompts, and the seed.
        """
        context, key = run
        prompt = self.contexts["long"] if context == "long" else self.prompts[number % len(self.prompts)]
        stats = GenerationStats()
        moments = [(0, dict(stats.seconds))]
        for _ in self.engine.stream(prompt, tokens, self.temperature, seed=number, stats=stats, plan=self.plans[key]):
            moments.append((stats.rounds, dict(stats.seconds)))
        if self.engine.target.device.type == "cuda":
            moments = [(0, dict.fromkeys(PHASES, 0.0)), (stats.rounds, dict(stats.seconds))]
        found: Sample = of_main(between(moments))
        return found

    @property
    def error(self) -> float:
        """Standard error of a plan's mean, relative to it: that of most plans (their median)."""
        return median(map(_error, self.samples.values()))

    def contradicts(self) -> bool:
        """Whether more nodes or more steps took less time, so that times had to be evened out to rise."""
        series = [self._times("verify", context, "nodes", self.num_draft_tokens) for context in self.contexts]
        series.append(self._times("draft", "short", "steps", range(1, self.num_steps + 1)))
        pairs = (pair for times in filter(None, series) for pair in zip(times, _rising(times), strict=True))
        return any(abs(time - risen) > MISFIT * risen for time, risen in pairs)

    def _times(self, phase: str, context: str, kind: str, counts: Iterable[int]) -> list[float]:
        """Of one phase, by rows or steps, where they were timed."""
        found = [self.samples[context, (kind, count)] for count in counts]
        return [undisturbed(samples, phase) for samples in found if samples]

    def latency(self) -> Latency:
        """The table of what was timed.

        Raises:
            GraftError: a plan never ran a round.
        """
        if not all(self.samples.values()):
            raise GraftError(
                "the device could not be timed, because the prompts that were to do so ended with their first token: "
                "take prompts that the target continues"
            )

        def typical(phase: str, *key: str | int, context: str = "short") -> float:
            return undisturbed(self.samples[context, key], phase)  # type: ignore[index]

        def more(phases: tuple[str, ...], name: str, than: str) -> float:
            return max(0.0, sum(typical(phase, name, 1) - typical(phase, than, 1) for phase in phases))

        sources = [name for name in SOURCES if (name, 1) in self.plans]
        spreads = [_relative_spread(found) for found in self.samples.values()]
        return Latency(
            num_draft_tokens=self.num_draft_tokens,
            contexts=[
                int(np.median([len(prompt) for prompt in self.prompts])),
                *(len(prompt) for context, prompt in self.contexts.items() if context != "short"),
            ],
            verify_ms=[
                _rising([typical("verify", "nodes", nodes, context=context) for nodes in self.num_draft_tokens])
                for context in self.contexts
            ],
            draft_ms=_rising([0.0, *(typical("draft", "steps", step) for step in range(1, self.num_steps + 1))]),
            build_ms=typical("graft", "steps", 1),
            commit_ms=typical("commit", "steps", 1),
            source_ms={name: more(("graft", "commit"), name, "steps") for name in sources},
            read_ms=more(("draft", "graft"), "gate", sources[0]),
            spread=[median(spreads), max(spreads)],
        )


def _forced_plans(
    num_draft_tokens: list[int], topk: int, num_steps: int, templates: dict[str, RankPaths]
) -> dict[tuple[str, int], Plan]:
    """Plans that leave no choice: of every number of nodes, of every number of steps, and with every source.

    All share the noise of draws, which takes longer than not to.
    """
    drafted = ((1.0, 0.0),) * num_steps
    models = {name: flat_model(name, template) for name, template in templates.items()}
    middle = min(topk, num_draft_tokens[len(num_draft_tokens) // 2])
    plans: dict[tuple[str, int], ScoredPlan] = {}

    def force(key: tuple[str, int], steps: int, nodes: int, *sources: SourceModel) -> None:
        plans[key] = ScoredPlan(
            (Checkpoint(steps, num_draft_tokens=nodes),),
            topk,
            learns_accepted=True,
            shares_noise=True,
            acceptance=AcceptanceModel(drafted, sources),
        )

    retrieved = sum(map(len, templates.values()))
    for nodes in num_draft_tokens:
        force(("nodes", nodes), 0 if nodes <= 1 + retrieved else num_steps, nodes, *models.values())
    for steps in range(1, num_steps + 1):
        force(("steps", steps), steps, middle)
    for name, model in models.items():
        force((name, 1), 1, middle, model)
    first, template = next(iter(templates.items()))
    asked = plans[first, 1]
    # Nothing promises so much: the head is asked all the same.
    gate = Checkpoint(0, 1e9, min(middle, 1 + len(template)))
    plans["gate", 1] = replace(asked, checkpoints=(gate, *asked.checkpoints))
    return dict(plans)


def flat_model(name: str, template: RankPaths) -> SourceModel:
    """A source whose candidates all have an even chance, or the probability that it gives them."""
    depths, kinds = max(map(len, template)), SOURCES[name].kinds
    slopes = () if kinds else (1.0,) * depths
    return SourceModel(name, template, slopes, ((0.0,) * depths,) * max(1, kinds), (0.0,) * _ranks(template))


def _ranks(template: RankPaths) -> int:
    return 1 + max(path[-1] for path in template)


def _rising(times: list[float]) -> list[float]:
    """The nearest times that never fall: more work never costs less, what says otherwise is noise."""
    return isotonic_regression(times).x.tolist()


def _contexts(prompts: list[Tensor], longest: int) -> dict[str, Tensor]:
    """A prompt as they are, and a text as long as they grow, put together from many, where that is much longer."""
    text = torch.cat(prompts)
    text = text.repeat(-(-longest // len(text)))[:longest]
    short = {"short": prompts[0]}
    return short | {"long": text} if longest > 2 * median(map(len, prompts)) else short


def _relative_spread(samples: list[Sample]) -> float:
    low, middle, high = np.percentile([whole_ms(one) for sample in samples for one in sample], [25, 50, 75])
    return float((high - low) / middle)


def _error(samples: list[Sample]) -> float:
    """Standard error of the mean, relative to it. Of a single sample it is not known, and taken to be UNKNOWN."""
    times = list(map(mean_ms, samples))
    return float(sem(times) / np.mean(times)) if len(times) > 1 else UNKNOWN


def _is_sure(samples: list[Sample]) -> bool:
    return len(samples) >= SURE_SAMPLES and _error(samples) < SURE


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

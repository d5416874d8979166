"""What a round costs on this device, by phase, against head passes, verified rows and context."""

from dataclasses import asdict, dataclass, replace
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from scipy.stats import sem
from torch import Tensor

from graft_inference import GraftEngine, GraftError, Plan, Scale, Stage
from graft_inference.policy.plan import RankPaths
from graft_inference.retrieval.prompt_lookup import LONGEST
from graft_train.calibrate.budget import Budget
from graft_train.processes import of_main

SAMPLE, WARM_UP = 12, 2
"""Tokens of one sample, and of the run of each plan that comes before them, without CUDA graphs."""
MOST_SAMPLES = 32
SURE, SURE_SAMPLES = 0.02, 3
"""Standard error of a plan's mean, relative to it, at which it needs no more samples, of which there are some."""
FALL = 0.05
"""More work that takes less time by this share, and by three standard errors, contradicts."""


@dataclass
class Latency:
    """Median milliseconds per round, and the spread they were seen with.

    Attributes:
        widths: rows of a verification that were timed: of those asked for, what a tree can have.
        contexts: tokens in the cache at which they were timed.
        verify_ms: one target pass, [contexts][widths].
        draft_ms: the head at 0, 1, 2, ... passes.
        graft_ms: choosing the tree without retrieved candidates, with the matrix's, and with those of longer contexts.
        commit_ms: acceptance and keeping its result without teaching the matrix, with, and n-grams besides.
            Both end after two where there are no longer contexts.
        echo_ms: searching the request's own text, and remembering it.
        read_ms: foreseeing what was retrieved, and one more host read, to leave out drafting.
        spread: interquartile range over median of each timed plan's rounds: the median of them, and the most.
    """

    widths: list[int]
    contexts: list[int]
    verify_ms: list[list[float]]
    draft_ms: list[float]
    graft_ms: list[float]
    commit_ms: list[float]
    echo_ms: float
    read_ms: float
    spread: list[float]

    def round_ms(self, plan: Plan, stage: Stage, context_T: np.ndarray) -> np.ndarray:
        """Cost of rounds that stop at this stage, [T]."""
        expanded, learned = plan.expands + plan.ngrams, plan.expands + plan.ngrams
        asks_first = plan.scale is not None and len(plan.stages) > 1 and not plan.stages[0].passes
        fixed = self.draft_ms[stage.passes] + self.graft_ms[expanded] + self.commit_ms[learned]
        fixed += self.echo_ms * plan.echoes
        by_context = [np.interp(stage.rows, self.widths, times) for times in self.verify_ms]
        return fixed + asks_first * self.read_ms + np.interp(context_T, self.contexts, by_context)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class RoundTimer:
    """Times forced plans on real prompts, interleaved, after a warm-up of each.

    Args:
        temperature: of the draws, which take longer than the likeliest tokens do.
        templates: rank paths looked up in the matrix and by longer contexts; none: not timed.
        longest: tokens of the longest text that plans will meet.
    """

    def __init__(
        self,
        engine: GraftEngine,
        prompts: list[Tensor],
        widths: list[int],
        topk: int,
        num_steps: int,
        temperature: float,
        templates: tuple[RankPaths, RankPaths],
        longest: int,
    ) -> None:
        self.engine, self.prompts, self.temperature = engine, prompts, temperature
        most = 1 + topk + (num_steps - 1) * topk**2 + len(templates[0])
        self.widths, self.num_steps = sorted({1, *(width for width in widths if width <= most)}), num_steps
        self.plans = _forced_plans(self.widths, topk, num_steps, *templates)
        self.contexts = _contexts(prompts, min(longest, engine.target.max_positions - SAMPLE))
        runs = [("long", key) for key in self.plans if key[0] == "width"] if len(self.contexts) > 1 else []
        runs = [("short", key) for key in self.plans] + runs
        self.samples: dict[tuple[str, tuple[str, int]], list[dict[str, float]]] = {run: [] for run in runs}
        if engine.captured is not None:
            # Graphs go where a deeper tree or a longer text comes: the deepest and the longest first.
            text = self.contexts.get("long", prompts[0])
            engine.generate(text, SAMPLE, temperature, plan=self.plans["echo", 1], seed=0)
        for run in runs:
            self.timed(run, 0, WARM_UP if engine.captured is None else SAMPLE)

    def fill(self, budget: Budget) -> None:
        """Samples all plans in turn until each one's mean is known or the budget is spent, but each of them once."""
        for number in range(MOST_SAMPLES):
            if all(map(_is_sure, self.samples.values())):
                return
            for run in self.samples if number % 2 else reversed(self.samples):
                missing = not self.samples[run] and number < len(self.prompts)
                if missing or (self.samples[run] and budget.left > 0):
                    found = self.timed(run, number)
                    self.samples[run] += [found] if found else []

    def timed(self, run: tuple[str, tuple[str, int]], number: int, tokens: int = SAMPLE) -> dict[str, float] | None:
        """Milliseconds per round by phase, once; None where the target ended the prompt at once.

        Args:
            number: whose turn it is among the prompts, and the seed.
        """
        context, key = run
        prompt = self.contexts["long"] if context == "long" else self.prompts[number % len(self.prompts)]
        stats = self.engine.generate(prompt, tokens, self.temperature, plan=self.plans[key], seed=number).stats
        if not stats.rounds:
            return None
        found: dict[str, float] = of_main({name: 1e3 * time / stats.rounds for name, time in stats.seconds.items()})
        return found

    def forget(self) -> None:
        """The table begins anew."""
        for found in self.samples.values():
            found.clear()

    @property
    def error(self) -> float:
        """Standard error of a plan's mean, relative to it: that of most plans (their median)."""
        return median(_error(list(map(whole_ms, found))) for found in self.samples.values())

    def contradicts(self) -> bool:
        """Whether more rows or more passes took less time, by more than noise explains."""
        rising = [("verify", [(context, ("width", width)) for width in self.widths]) for context in self.contexts]
        rising.append(("draft", [("short", ("passes", passes)) for passes in range(1, self.num_steps + 1)]))
        return any(_falls([self.samples[run] for run in runs], phase) for phase, runs in rising)

    def latency(self) -> Latency:
        """The table of what was timed since it was last forgotten.

        Raises:
            GraftError: a plan never ran a round.
        """
        if not all(self.samples.values()):
            raise GraftError(
                "the device could not be timed, because the prompts that were to do so ended with their first token: "
                "take prompts that the target continues"
            )

        def typical(phase: str, *key: str | int, context: str = "short") -> float:
            return median(sample[phase] for sample in self.samples[context, key])  # type: ignore[index]

        def more(phases: tuple[str, ...], name: str, than: str) -> float:
            return max(0.0, sum(typical(phase, name, 1) - typical(phase, than, 1) for phase in phases))

        sources = [source for source in ("passes", "both", "ngrams") if (source, 1) in self.plans]
        spreads = [_relative_spread(found) for found in self.samples.values()]
        return Latency(
            widths=self.widths,
            contexts=[
                int(np.median([len(prompt) for prompt in self.prompts])),
                *(len(prompt) for context, prompt in self.contexts.items() if context != "short"),
            ],
            verify_ms=[
                _rising([typical("verify", "width", width, context=context) for width in self.widths])
                for context in self.contexts
            ],
            draft_ms=_rising([0.0, *(typical("draft", "passes", p) for p in range(1, self.num_steps + 1))]),
            graft_ms=[typical("graft", source, 1) for source in sources],
            commit_ms=[typical("commit", source, 1) for source in sources],
            echo_ms=more(("graft", "commit"), "echo", "passes"),
            read_ms=more(("draft", "graft"), "gate", "both"),
            spread=[median(spreads), max(spreads)],
        )


def _forced_plans(
    widths: list[int],
    topk: int,
    num_steps: int,
    template: RankPaths,
    ngram_template: RankPaths,
) -> dict[tuple[str, int], Plan]:
    """Plans that leave no choice: of every width, of every number of passes, and with every overhead.

    All share the noise of draws, which takes longer than not to.
    """
    flat = ((1.0, 0.0),)
    ranks = (0.0,) * (1 + max(path[-1] for path in (*template, *ngram_template)))
    both = Scale(flat * num_steps, flat * max(map(len, template)), ranks, template)
    drafted = replace(both, template=())
    budget = max(*widths, topk + 1)
    middle = min(topk, widths[len(widths) // 2])
    plans = {}
    for width in widths:
        passes = 0 if width <= 1 + len(template) else num_steps
        plans["width", width] = Plan((Stage(passes, width=width),), topk, budget, both)
    for passes in range(1, num_steps + 1):
        plans["passes", passes] = Plan((Stage(passes, width=middle),), topk, budget, drafted)
    plans["both", 1] = Plan((Stage(1, width=middle),), topk, budget, both)
    if ngram_template:
        longer = Scale(both.drafted, flat * max(map(len, ngram_template)), ranks, ngram_template)
        plans["ngrams", 1] = replace(plans["both", 1], scale=longer, ngrams=True)
    rows = tuple(-0.1 * depth for depth in range(1, budget))
    plans["echo", 1] = replace(plans["passes", 1], scale=replace(drafted, echo=(rows,) * LONGEST))
    # Nothing promises so much: the head is asked all the same.
    gate = Stage(0, 1e9, width=min(middle, 1 + len(template)))
    plans["gate", 1] = replace(plans["both", 1], stages=(gate, *plans["both", 1].stages))
    return {key: replace(plan, shares_noise=True) for key, plan in plans.items()}


def _rising(times: list[float]) -> list[float]:
    """The nearest times that never fall: more work never costs less, what says otherwise is noise."""
    return isotonic_regression(times).x.tolist()


def _contexts(prompts: list[Tensor], longest: int) -> dict[str, Tensor]:
    """A prompt as they are, and a text as long as they grow, put together from many, where that is much longer."""
    text = torch.cat(prompts)
    text = text.repeat(-(-longest // len(text)))[:longest]
    short = {"short": prompts[0]}
    return short | {"long": text} if longest > 2 * median(map(len, prompts)) else short


def whole_ms(sample: dict[str, float]) -> float:
    """Of one round, all phases together."""
    return sum(sample.values()) - sample["prefill"]


def _relative_spread(samples: list[dict[str, float]]) -> float:
    low, middle, high = np.percentile(list(map(whole_ms, samples)), [25, 50, 75])
    return float((high - low) / middle)


def _error(times: list[float]) -> float:
    """Standard error of the mean, relative to it. Of a single time it is unknown, and taken to be FALL."""
    return float(sem(times) / np.mean(times)) if len(times) > 1 else FALL


def _is_sure(samples: list[dict[str, float]]) -> bool:
    return len(samples) >= SURE_SAMPLES and _error(list(map(whole_ms, samples))) < SURE


def _falls(series: list[list[dict[str, float]]], phase: str) -> bool:
    """Whether any of a series that ought to rise lies below one before it."""
    times = [[sample[phase] for sample in samples] for samples in series if samples]
    means = [float(np.mean(found)) for found in times]
    errors = [_error(found) * mean for found, mean in zip(times, means, strict=True)]
    return any(
        means[less] - means[more] > max(FALL * means[more], 3 * float(np.hypot(errors[less], errors[more])))
        for less, more in combinations(range(len(times)), 2)
    )

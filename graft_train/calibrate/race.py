"""Plans on the real engine, interleaved, and what was found of them."""

from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from graft_inference import GraftEngine, Plan
from graft_train.calibrate.budget import Budget
from graft_train.calibrate.replay import Forecast
from graft_train.calibrate.standings import LEAST_LAPS, Lap, Run, Standings
from graft_train.calibrate.timer import Pace
from graft_train.processes import is_main, of_main

BOOTSTRAP = 2000
WARM_UP = 8
"""Tokens of every plan before the first lap, without CUDA graphs."""
RUNS_PER_PROBE = 3


@dataclass
class Track:
    """What plans run over.

    At a temperature every plan continues a prompt by one text, whose seed is the prompt's place, as its trace's is.

    Attributes:
        pace: is asked for the device's speed after every few runs.
        redraws: each time that a prompt comes round it is continued by another text.
    """

    engine: GraftEngine
    prompts: list[Tensor]
    max_new_tokens: int
    temperature: float
    pace: Pace | None = None
    redraws: bool = False

    def warm_up(self, plans: dict[str, Plan]) -> None:
        """Runs every plan a little; where rounds become CUDA graphs, so far that most of them have been captured."""
        tokens = WARM_UP if self.engine.captured is None else self.max_new_tokens
        for plan in plans.values():
            self.engine.generate(self.prompts[0], tokens, self.temperature, plan=plan, seed=0)

    def lap(self, number: int, plans: dict[str, Plan]) -> Lap:
        """Runs every plan over the prompt whose turn it is; the order turns too. All processes get the same times."""
        place, names = number % len(self.prompts), list(plans)
        turn = number // 2 % len(names)
        order = names[turn:] + names[:turn]
        seed = number if self.redraws else place
        runs = {}
        for count, name in enumerate(reversed(order) if number % 2 else order, start=number * len(names)):
            stats = self.engine.generate(
                self.prompts[place], self.max_new_tokens, self.temperature, plan=plans[name], seed=seed
            ).stats
            runs[name] = Run(*of_main((stats.emitted - 1, stats.decode_seconds, stats.rounds)))
            if self.pace and not count % RUNS_PER_PROBE:
                self.pace.probe()
        return Lap(place, runs)


def race(track: Track, plans: dict[str, Plan], standings: Standings, budget: Budget) -> Standings:
    """Laps until one plan is left or another lap would overdraw the budget; see `Standings` for who drops out.

    Args:
        plans: no two of them alike.
        standings: of these plans, before the first lap.
        budget: overdrawn for the first LEAST_LAPS laps alone.
    """
    track.warm_up(plans)
    number, lap_seconds = 0, 0.0
    with tqdm(desc="calibrate: race", unit="lap", disable=not is_main()) as bar:
        while len(standings.laps) < LEAST_LAPS or (len(standings.left) > 1 and budget.left > lap_seconds):
            before = budget.left
            standings.add(track.lap(number, {name: plans[name] for name in standings.left}))
            lap_seconds = before - budget.left
            number += 1
            bar.set_postfix_str(f"{len(standings.left)} plans left")
            bar.update()
    return standings


def full_race(track: Track, plans: dict[str, Plan], repeats: int) -> dict[str, dict[str, Any]]:
    """Speed and acceptance length of each plan over all prompts, each of them so often, with nobody dropped.

    Returns:
        By plan: `tokens_per_second`, `acceptance_length`, and per prompt `tokens` and `seconds`, from which `ratio`
        makes intervals.
    """
    track.warm_up(plans)
    total = repeats * len(track.prompts)
    laps = [track.lap(number, plans) for number in tqdm(range(total), "race", unit="lap", disable=not is_main())]
    return {name: summary(laps, name) for name in plans}


def distinct(plans: dict[str, Plan]) -> dict[str, str]:
    """The first name of each plan's likes: what came out equal runs once."""
    first = {plan: name for name, plan in reversed(plans.items())}
    return {name: first[plan] for name, plan in plans.items()}


def summary(laps: list[Lap], name: str) -> dict[str, Any]:
    """Of the laps of one plan; of a prompt's laps the median time per token and the mean of tokens count.

    At a temperature that redraws, laps of a prompt emit other tokens: the time per token is what they share.
    """
    runs: dict[int, list[Run]] = {}
    for lap in laps:
        runs.setdefault(lap.place, []).append(lap.runs[name])
    tokens = [sum(run.tokens for run in prompt) / len(prompt) for prompt in runs.values()]
    per_token = [median(run.seconds / max(run.tokens, 1) for run in prompt) for prompt in runs.values()]
    seconds = [count * time for count, time in zip(tokens, per_token, strict=True)]
    rounds = [sum(run.rounds for run in prompt) / len(prompt) for prompt in runs.values()]
    return {
        "tokens_per_second": sum(tokens) / sum(seconds) if sum(seconds) else 0.0,
        "acceptance_length": sum(tokens) / max(sum(rounds), 1),
        "tokens": tokens,
        "seconds": seconds,
    }


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float, float]:
    """Speed of one plan over another's, and the 95 % interval by bootstrap over prompts."""
    columns = [np.array(found[name]) for found in (ours, theirs) for name in ("tokens", "seconds")]
    drawn = np.random.default_rng(0).integers(len(columns[0]), size=(BOOTSTRAP, len(columns[0])))
    chosen = np.concatenate((np.arange(len(columns[0]))[None], drawn))
    tokens, seconds, base_tokens, base_seconds = (column[chosen].sum(axis=1) for column in columns)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = (tokens / seconds) / (base_tokens / base_seconds)
    low, high = np.nanpercentile(ratios[1:], [2.5, 97.5])
    return float(ratios[0]), float(low), float(high)


def found_of(standings: Standings, racer: str, forecast: Forecast) -> dict[str, Any]:
    """What a race found of one plan.

    `tokens_per_second` over all prompts: what the replay foretells, corrected by the laps that the plan ran. `weighed`:
    corrected as far as their noise allows, by which plans are chosen. `acceptance_length` and `acceptance_foretold` are
    of the prompts that it ran. `over_fastest`: its measured speed over the fastest plan's and the 95 % interval.
    """
    laps, tokens = standings.ran(racer), forecast.tokens_P.sum()
    places = sorted({lap.place for lap in laps})
    return {
        "tokens_per_second": float(tokens / standings.seconds(racer)),
        "weighed": float(tokens / standings.seconds(standings.leader) * np.exp(standings.lead(racer)[0])),
        "acceptance_length": summary(laps, racer)["acceptance_length"],
        "acceptance_foretold": float(forecast.tokens_P[places].sum() / forecast.rounds_P[places].sum()),
        "laps": len(laps),
        "left": racer in standings.left,
        "over_fastest": np.exp(standings.ratio(racer)).tolist(),
    }


def race_of(standings: Standings, pace: Pace) -> dict[str, Any]:
    """How the race went: its laps, who is left (one, if it was decided), and the device's speed meanwhile."""
    return {
        "laps": len(standings.laps),
        "left": standings.left,
        "fastest": standings.leader,
        "slowness": pace.factor,
        "variation": pace.variation,
    }

"""What replays foretell of every prompt, and what a race found of every plan, as a report has it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from graft_inference import Plan
from graft_train.calibrate.pace import Pace
from graft_train.calibrate.race import summary
from graft_train.calibrate.replay import Replay
from graft_train.calibrate.standings import Standings


@dataclass
class Forecast:
    """Of every prompt: the tokens, rounds and seconds of one plan, [P]."""

    tokens_P: np.ndarray
    rounds_P: np.ndarray
    seconds_P: np.ndarray

    @classmethod
    def of(cls, replay: Replay, plan: Plan) -> "Forecast":
        outcome = replay.outcome(plan)
        visited = replay.visits(outcome)
        prompt_V = replay.traces.prompt_T.numpy()[visited]
        columns = (outcome.tokens_T, np.ones_like(outcome.tokens_T), outcome.ms_T / 1e3)
        return cls(*(np.bincount(prompt_V, column[visited]) for column in columns))


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

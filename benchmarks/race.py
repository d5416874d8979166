"""Does calibration within its minutes choose what a full race chooses, and what does it save?

    python benchmarks/race.py --run-dir runs/smollm2

Needs the target, data, head and corpus of a run. Every plan that `calibrate` would race runs over every calibration
prompt, several times, interleaved: that is the full race. Then its noise is replayed with ten seeds: a plan takes for a
prompt the median of what it took, times the noise of a lap drawn from all recorded ones, of all plans together. On each
replay a full race and one with elimination, which ends with its minutes, choose; seconds are those replayed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from policy import load_engine, track_of
from rich.console import Console
from rich.table import Table

from graft_inference import GraftEngine
from graft_train.calibrate import learn, replays_of, taught_by_all
from graft_train.calibrate.budget import TABLE, TRACES
from graft_train.calibrate.measure import timer_of
from graft_train.calibrate.race import distinct, full_race
from graft_train.calibrate.replay import Forecast, replay_of
from graft_train.calibrate.standings import LEAST_LAPS, Lap, Run, Standings
from graft_train.calibrate.traces import record_traces
from graft_train.config.policy import CalibrateConfig
from graft_train.data.samples import read_samples
from graft_train.device import describe_device
from graft_train.files import write_json

SEEDS = 10
WITHIN = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-race.json"), help="what was recorded, kept")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.out.exists():
        settings = CalibrateConfig(
            prompts=arguments.prompts, max_new_tokens=arguments.tokens, topk=4, num_steps=5,
            num_draft_tokens=[1, 2, 4, 8, 12, 16], retrieval_depth=5, checkpoints=2, minutes=arguments.minutes,
        )  # fmt: skip
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, record(load_engine(arguments.run_dir), settings, arguments))
    recorded = json.loads(arguments.out.read_text(encoding="utf-8"))
    Console(width=120).print(table_of(recorded, arguments.minutes))


def record(engine: GraftEngine, settings: CalibrateConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of every plan: foretold seconds of each prompt, [P], and measured ones, [repeats, P]; and the prompts' tokens."""
    samples = read_samples(arguments.run_dir / "data" / "samples.jsonl", "calibration")[: settings.prompts]
    prompts = [torch.tensor(sample.prompt_ids) for sample in samples]
    traces = {False: record_traces(engine, prompts, settings)}
    replays = replays_of(settings, traces, timer_of(settings, engine, prompts, traces).latency())
    plans = learn(settings, replays)
    forecasts = {name: Forecast.of(replay_of(replays, plan), plan) for name, plan in plans.items()}
    racers = plans | taught_by_all(plans)
    runs_as = distinct(racers)
    contestants = {name: racers[name] for name in racers if runs_as[name] == name}
    track = track_of(engine, settings, prompts)
    rounds = [full_race(track, contestants, 1) for _ in range(arguments.repeats)]
    going_on = np.flatnonzero(forecasts["eagle3"].tokens_P).tolist()
    return {
        "device": describe_device(engine.target.device),
        "tokens": forecasts["eagle3"].tokens_P[going_on].tolist(),
        "foretold": {name: forecasts[name.partition(",")[0]].seconds_P[going_on].tolist() for name in contestants},
        "measured": {
            name: [[one[name]["seconds"][place] for place in going_on] for one in rounds] for name in contestants
        },
    }


class Replayed:
    """Laps with the noise of recorded ones."""

    def __init__(self, recorded: dict[str, Any], seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.tokens = recorded["tokens"]
        self.foretold = {name: np.array(times) for name, times in recorded["foretold"].items()}
        measured = {name: np.array(times) for name, times in recorded["measured"].items()}
        self.usual = {name: np.median(times, axis=0) for name, times in measured.items()}
        self.noise = {name: (times / self.usual[name]).ravel() for name, times in measured.items()}

    def lap(self, number: int, names: list[str]) -> Lap:
        place, drawn = number % len(self.tokens), self.random.integers(len(self.noise[names[0]]))
        seconds = {name: float(self.usual[name][place] * self.noise[name][drawn]) for name in names}
        return Lap(place, {name: Run(int(self.tokens[place]), seconds[name], 1) for name in names})

    def full(self, repeats: int) -> tuple[str, float]:
        """The choice by each prompt's median, and the seconds it took."""
        names = list(self.usual)
        laps = [self.lap(number, names) for number in range(repeats * len(self.tokens))]
        times_LP = np.array([[lap.runs[name].seconds for name in names] for lap in laps])
        totals_P = np.median(times_LP.reshape(repeats, -1, len(names)), axis=0).sum(axis=0)
        return names[int(totals_P.argmin())], float(times_LP.sum())

    def raced(self, seconds: float) -> tuple[Standings, float]:
        standings, spent, last = Standings(self.foretold), 0.0, 0.0
        while len(standings.laps) < LEAST_LAPS or (len(standings.left) > 1 and spent + last <= seconds):
            lap = self.lap(len(standings.laps), standings.left)
            last = sum(run.seconds for run in lap.runs.values())
            spent += last
            standings.add(lap)
        return standings, spent


def table_of(recorded: dict[str, Any], minutes: float) -> Table:
    """Each seed's two choices, how much slower the second is, the laps and the seconds of both."""
    device, repeats = recorded["device"], len(next(iter(recorded["measured"].values())))
    table = Table(title=f"{device['name']}, {device['threads']} threads, policy.minutes={minutes:g}")
    for name in ("seed", "full race", "within the minutes", "behind by", "laps", "seconds", "of"):
        table.add_column(name, justify="left" if "race" in name or "minutes" in name else "right")
    same = 0
    for seed in range(SEEDS):
        replayed = Replayed(recorded, seed)
        full, whole = replayed.full(repeats)
        standings, spent = replayed.raced(60 * minutes * (1 - TRACES - TABLE))
        chosen = standings.leader
        behind = replayed.usual[chosen].sum() / replayed.usual[full].sum() - 1
        same += behind < WITHIN
        cells = (full, chosen, f"{behind:.1%}", str(len(standings.laps)), f"{spent:.0f}", f"{whole:.0f}")
        table.add_row(str(seed), *cells)
    table.caption = f"the same choice, or one within {WITHIN:.0%}: {same} of {SEEDS}"
    return table


if __name__ == "__main__":
    main()

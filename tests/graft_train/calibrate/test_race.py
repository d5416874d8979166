"""Races that end early choose what full ones choose, and calibration keeps to its minutes."""

from collections import Counter
from importlib import import_module
from itertools import combinations, permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from graft_inference import QuotaCheckpoint, QuotaPlan
from graft_inference.stats import PHASES
from graft_train.calibrate import budget as budget_module
from graft_train.calibrate import measure
from graft_train.calibrate import timer as timer_module
from graft_train.calibrate.budget import Budget
from graft_train.calibrate.race import Track, distinct, full_race, race, summary
from graft_train.calibrate.report import notes
from graft_train.calibrate.rounds import between, undisturbed
from graft_train.calibrate.standings import LEAST_LAPS, Lap, Run, Standings
from graft_train.calibrate.timer import Pace, RoundTimer
from graft_train.config.policy import CalibrateConfig
from graft_train.processes import of_main

race_module = import_module("graft_train.calibrate.race")  # the package has the function by this name
PROMPTS, REPEATS = 14, 5
SPEEDS = {
    "eagle3": 1.0, "draft_only": 1.06, "retrieve_only": 1.22, "paper": 0.94, "learned": 1.25, "learned, all": 1.24,
    "retrieve_only, all": 1.15,
}  # fmt: skip
"""Of plans, as were seen on a small instruct model."""


class Machine:
    """Takes what a plan needs for a prompt, times noise: of every run, of its moment, and now and then a hiccup.

    Args:
        seed: of the plans' true times, [plans][prompts], which their replay foretells to some 5 %, and of the noise.
    """

    def __init__(self, seed: int, noise: float = 0.04) -> None:
        self.random, self.noise, self.moment = np.random.default_rng(seed), noise, 0.0
        prompts = self.random.lognormal(0, 0.3, PROMPTS)
        self.foretold, self.true = {}, {}
        for name, speed in SPEEDS.items():
            own = prompts * self.random.lognormal(0, 0.15, PROMPTS)  # what suits one plan does not suit another
            self.foretold[name] = own * prompts.sum() / own.sum() / speed
            error = self.random.normal(0, 0.05) + self.random.normal(0, 0.03, PROMPTS)
            self.true[name] = self.foretold[name] * np.exp(error)

    def lap(self, number: int, names: list[str]) -> Lap:
        place = number % PROMPTS
        self.moment = 0.8 * self.moment + self.random.normal(0, 0.1)
        hiccup = {name: 1.8 if self.random.random() < 0.02 else 1.0 for name in names}
        slowness = {name: hiccup[name] * np.exp(self.moment + self.random.normal(0, self.noise)) for name in names}
        return Lap(place, {name: Run(50, self.true[name][place] * slowness[name], 20) for name in names})

    def speed(self, name: str) -> float:
        return 1 / self.true[name].sum()


def raced(machine: Machine, most_laps: int) -> tuple[Standings, int]:
    """With elimination; and the runs that it took."""
    standings, runs, number = Standings(machine.foretold), 0, 0
    while len(standings.laps) < LEAST_LAPS or (len(standings.left) > 1 and number < most_laps):
        runs += len(standings.left)
        standings.add(machine.lap(number, standings.left))
        number += 1
    return standings, runs


def test_elimination_chooses_what_a_full_race_chooses_in_half_its_runs():
    """In at least 9 of 10 seeds the same plan, or one within 1 % of its true speed."""
    same, runs = 0, 0
    for seed in range(10):
        machine = Machine(seed)
        laps = [machine.lap(number, list(SPEEDS)) for number in range(REPEATS * PROMPTS)]
        full = max(SPEEDS, key=lambda name: summary(laps, name)["tokens_per_second"])
        standings, took = raced(machine, REPEATS * PROMPTS)
        same += standings.leader == full or machine.speed(standings.leader) > 0.99 * machine.speed(full)
        runs += took
    assert same >= 9
    assert runs < 0.5 * 10 * REPEATS * PROMPTS * len(SPEEDS)


def test_a_plan_that_is_far_behind_drops_out_at_once_and_never_the_best():
    for seed in range(40):
        machine = Machine(seed)
        machine.true["paper"] = 2 * machine.true["paper"]
        standings, _ = raced(machine, 40)
        assert standings.dropped["paper"] <= 5
        best = max(machine.true, key=machine.speed)
        assert best in standings.left or machine.speed(standings.leader) > 0.985 * machine.speed(best)


def test_prompts_that_suit_a_plan_do_not_decide_for_it():
    """It is twice as fast on the prompts that come first, as its replay knows, and slower on all together."""
    early = np.where(np.arange(PROMPTS) < 4, 0.5, 1.5)
    foretold = {"early": early, "even": np.ones(PROMPTS)}
    standings = Standings(foretold)
    for place in range(4):
        wobble = 1 + 0.001 * (-1) ** place
        runs = {"early": Run(50, 0.5 * wobble, 20), "even": Run(50, 1.0, 20)}
        standings.add(Lap(place, {name: runs[name] for name in standings.left}))
    assert standings.leader == "even"
    assert standings.dropped == {"early": LEAST_LAPS}
    assert standings.seconds("early") == pytest.approx(early.sum(), rel=2e-3)


def test_a_hiccup_is_cut_down_to_what_is_usual():
    """One run in nine laps takes three times as long: the plan, 5 % faster otherwise, keeps its lead."""
    random = np.random.default_rng(0)
    standings = Standings({name: np.ones(9) for name in "abc"}, error=1.0)
    for place in range(9):
        seconds = {"a": 1.0, "b": 1.05, "c": 1.05}
        runs = {name: Run(9, time * float(random.lognormal(0, 0.01)), 5) for name, time in seconds.items()}
        if place == 4:
            runs["a"] = Run(9, 3.0, 5)
        standings.laps.append(Lap(place, runs))
    assert standings.leader == "a"
    assert standings.ratio("b")[0] == pytest.approx(-np.log(1.05), abs=0.015)


def test_a_plan_that_its_replay_foretells_badly_is_not_judged_by_the_others_noise():
    """It varies by 30 % from prompt to prompt, the others by 1 %: four laps that are 35 % behind say little of it."""
    random = np.random.default_rng(0)
    standings = Standings({name: np.ones(4) for name in "abcdef"}, error=1.0)
    for place, wobble in enumerate((0.3, -0.35, 0.1, -0.05)):
        runs = {name: Run(9, float(random.lognormal(0, 0.01)), 5) for name in "abcde"}
        runs["f"] = Run(9, 1.35 * float(np.exp(wobble)), 5)
        standings.add(Lap(place, {name: runs[name] for name in standings.left}))
    assert "f" in standings.left


def test_plans_that_are_within_the_noise_stay_in():
    random = np.random.default_rng(0)
    standings = Standings({name: np.ones(4) for name in "ab"})
    for number in range(12):
        standings.add(Lap(number % 4, {name: Run(9, float(random.lognormal(0, 0.1)), 5) for name in "ab"}))
    assert standings.left == ["a", "b"]
    _, low, high = standings.ratio("b" if standings.leader == "a" else "a")
    assert low < 0 < high


@pytest.mark.parametrize(("noise", "error", "leader"), [(0.4, 0.05, "b"), (0.4, 5.0, "a"), (0.01, 0.05, "a")])
def test_laps_overrule_the_replay_as_far_as_their_noise_allows(noise, error, leader):
    """Foretold: b is 10 % faster; measured: a, by 10 %. The first noise says nothing, unless replays say even less."""
    standings = Standings({"a": np.full(4, 1.1), "b": np.ones(4)}, error)
    for place in range(4):
        wobble = float(np.exp(noise * (-1) ** place))
        standings.laps.append(Lap(place, {"a": Run(9, wobble, 5), "b": Run(9, 1.1 / wobble, 5)}))
    assert standings.leader == leader
    follower, measured = ("a", np.log(1.1)) if leader == "b" else ("b", -np.log(1.1))
    assert standings.ratio(follower)[0] == pytest.approx(measured)
    weighed, error = standings.lead(follower)
    assert -np.log(1.1) < weighed < 0
    assert error > 0


def test_who_dropped_out_is_compared_over_the_laps_that_both_ran():
    """The machine became twice as slow later: that is not held for the one that had stopped, nor against the other."""
    standings = Standings({"fast": np.ones(6), "slow": np.ones(6)})
    for number in range(6):
        seconds = (1.0 if number < 3 else 2.0) * (1 + 0.001 * number)
        runs = {"fast": Run(9, seconds, 5), "slow": Run(9, 1.5 * seconds * (1 + 0.001 * (number % 2)), 5)}
        standings.add(Lap(number, {name: runs[name] for name in standings.left}))
    assert standings.dropped == {"slow": 3}
    assert len(standings.ran("slow")) == 3
    assert standings.seconds("slow") / standings.seconds("fast") == pytest.approx(1.5, rel=1e-2)
    middle, low, high = np.exp(standings.ratio("slow"))
    assert low < middle < high
    assert middle == pytest.approx(1 / 1.5, rel=1e-2)


def test_a_ratio_and_its_interval_over_laps_by_hand():
    """Gains over the leader of log 0.5 and log 0.8: their mean, and 12.706 standard errors of it (Student's t)."""
    standings = Standings({"a": np.ones(2), "b": np.ones(2)})
    standings.add(Lap(0, {"a": Run(9, 1.0, 5), "b": Run(9, 2.0, 5)}))
    standings.add(Lap(1, {"a": Run(9, 1.0, 5), "b": Run(9, 1.25, 5)}))
    middle, error = (np.log(0.5) + np.log(0.8)) / 2, 12.706 * (np.log(0.8) - np.log(0.5)) / 2
    assert standings.ratio("b") == pytest.approx((middle, middle - error, middle + error), rel=1e-4)


def test_a_prompt_that_ends_at_once_is_no_lap():
    standings = Standings({name: np.array([0.0, 1.0]) for name in "ab"})
    standings.add(Lap(0, {name: Run(0, 0.0, 0) for name in "ab"}))
    standings.add(Lap(1, {name: Run(3, 1.0, 2) for name in "ab"}))
    assert len(standings.laps) == 1
    assert standings.leader == "a"


# The race on an engine, whose clock is its own.


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(budget_module, "time", clock)
    return clock


class Engine:
    """Takes a plan's seconds for every token, by its number of rows."""

    captured = None

    def __init__(self, clock: Clock, seconds: dict[int, float]) -> None:
        self.clock, self.seconds, self.asked = clock, seconds, []

    def generate(self, prompt, tokens, temperature, plan, seed):
        rows = plan.checkpoints[0].num_draft_tokens
        self.asked.append((int(prompt[0]), rows, seed))
        seconds = (tokens - 1) * self.seconds[rows]
        self.clock.now += seconds
        return SimpleNamespace(stats=SimpleNamespace(emitted=tokens, decode_seconds=seconds, rounds=tokens - 1))


def plans_of(*rows: int) -> dict[str, QuotaPlan]:
    return {f"{count} rows": QuotaPlan((QuotaCheckpoint(1, drafted=count - 1),), 8) for count in rows}


def alike(*rows: int) -> Standings:
    return Standings({name: np.ones(3) for name in plans_of(*rows)})


def track_of(engine: Engine, **options) -> Track:
    return Track(engine, [torch.tensor([place]) for place in range(3)], 11, 0.0, **options)


def test_a_race_stops_before_a_lap_would_overdraw_its_budget(clock):
    """A lap takes 20 s, and the plans are alike: after the warm-up of 14 s, 100 s have room for four."""
    engine = Engine(clock, {2: 1.0, 3: 1.0})
    random = np.random.default_rng(0)
    foretold = {name: random.lognormal(0, 0.1, 3) for name in plans_of(2, 3)}
    standings = race(track_of(engine), plans_of(2, 3), Standings(foretold), Budget(100))
    assert len(standings.laps) == 4
    assert clock.now == 14 + 80


def test_a_race_that_has_no_time_runs_what_a_choice_needs(clock):
    engine = Engine(clock, {2: 1.0, 3: 3.0})
    standings = race(track_of(engine), plans_of(2, 3), alike(2, 3), Budget(0))
    assert len(standings.laps) == LEAST_LAPS
    assert standings.leader == "2 rows"


def test_a_race_ends_when_one_plan_is_left_and_the_dropped_one_runs_no_more(clock):
    engine = Engine(clock, {2: 1.0, 3: 1.02, 9: 2.0})
    foretold = {name: np.array([1.0, 1.001, 1.002]) for name in plans_of(2, 3, 9)}
    foretold["3 rows"] = np.array([1.0, 1.0, 1.0])
    standings = race(track_of(engine), plans_of(2, 3, 9), Standings(foretold), Budget(1e6))
    assert standings.left == ["2 rows"]
    assert standings.dropped["9 rows"] == LEAST_LAPS
    assert sum(rows == 9 for _, rows, _ in engine.asked) == 1 + LEAST_LAPS  # with the warm-up


def test_orders_turn_so_that_no_plan_is_favoured(clock):
    engine = Engine(clock, dict.fromkeys((2, 3, 4), 1.0))
    track = track_of(engine)
    firsts, before = [], Counter()
    for number in range(6):
        engine.asked.clear()
        track.lap(number, plans_of(2, 3, 4))
        order = [rows for _, rows, _ in engine.asked]
        firsts.append(order[0])
        before.update(combinations(order, 2))
        assert [place for place, _, _ in engine.asked] == [number % 3] * 3
        assert {seed for _, _, seed in engine.asked} == {number % 3}
    assert sorted(firsts) == [2, 2, 3, 3, 4, 4]
    assert before == dict.fromkeys(permutations((2, 3, 4), 2), 3), "each ran before each other as often as behind it"


def test_a_race_that_redraws_has_another_seed_each_time(clock):
    engine = Engine(clock, {2: 1.0})
    found = full_race(track_of(engine, redraws=True), plans_of(2), 2)
    assert [seed for _, _, seed in engine.asked] == [0, *range(6)]
    assert found["2 rows"]["tokens_per_second"] == pytest.approx(1.0)
    assert found["2 rows"]["acceptance_length"] == 1.0
    assert len(found["2 rows"]["tokens"]) == 3


def test_plans_that_came_out_equal_run_once():
    plans = {
        "first": QuotaPlan((QuotaCheckpoint(1, drafted=2),), 4),
        "other": QuotaPlan((QuotaCheckpoint(2, drafted=2),), 4),
    }
    assert distinct(plans | {"twin": plans["first"]}) == {"first": "first", "other": "other", "twin": "first"}


def test_all_processes_race_by_the_main_ones_times(clock, monkeypatch):
    """Here plan 2 was faster; the main process, which all go by, saw plan 3 win."""
    engine = Engine(clock, {2: 1.0, 3: 2.0})
    names, agreed = iter(["3 rows", "2 rows"] * LEAST_LAPS), []

    def of_the_main(value):
        if not isinstance(value, tuple):
            return of_main(value)
        agreed.append(value)
        tokens, seconds, rounds = value
        return tokens, 30.0 - seconds, rounds

    monkeypatch.setattr(race_module, "of_main", of_the_main)
    standings = race(track_of(engine), plans_of(2, 3), alike(2, 3), Budget(0))
    assert len(agreed) == 2 * LEAST_LAPS
    assert standings.leader == next(names)


# The latency table.


def sample(*milliseconds: float) -> list[dict[str, float]]:
    """Of rounds."""
    return [{"prefill": 100.0, "draft": 0.0, "graft": 0.0, "verify": one, "commit": 0.0} for one in milliseconds]


class Timed(RoundTimer):
    """Its plans take as many milliseconds as were given by number of the sweep and rows."""

    def __init__(self, clock, milliseconds, prompts=4):
        self.clock, self.milliseconds, self.asked = clock, milliseconds, []
        self.num_draft_tokens, self.num_steps, self.contexts = [1, 2, 4], 0, {"short": torch.tensor([0])}
        self.prompts = [torch.tensor([0])] * prompts
        self.samples, self.sweeps = {("short", ("nodes", width)): [] for width in self.num_draft_tokens}, 0

    def timed(self, run, number, tokens=timer_module.SAMPLE):
        self.clock.now += 1
        self.asked.append(run[1][1])
        found = self.milliseconds(number, run[1][1])
        return [] if found is None else sample(found)


def test_a_table_is_done_when_every_plan_is_known(clock):
    """Times that vary by 2 % are known to 2 % after three samples; by 10 %, after some twenty."""
    sweeps = {}
    for noise in (0.02, 0.1):
        random = np.random.default_rng(0)
        timer = Timed(clock, lambda number, width, random=random, noise=noise: width * random.normal(1, noise))
        timer.fill(Budget(1e6))
        assert len({len(found) for found in timer.samples.values()}) == 1, "all were sampled in turn"
        sweeps[noise] = len(timer.asked) // 3
    assert sweeps[0.02] in (3, 4)
    assert 15 < sweeps[0.1] <= timer_module.MOST_SAMPLES


def test_the_error_of_a_table_is_that_of_most_plans_means(clock):
    timer = Timed(clock, None)
    samples = {1: [1.0, 1.2], 2: [2.0, 2.0], 4: [9.0]}
    for width, times in samples.items():
        timer.samples["short", ("nodes", width)] = list(map(sample, times))
    assert timer.error == timer_module.UNKNOWN  # between 0 and 0.1 / 1.1
    timer.samples["short", ("nodes", 4)] = list(map(sample, [9.0, 11.0]))
    assert timer.error == pytest.approx(0.1 / 1.1)


def test_a_table_stops_when_its_budget_is_spent_but_has_every_plan(clock):
    timer = Timed(clock, lambda number, width: width * (1 + number % 2))
    timer.fill(Budget(8))
    assert len(timer.asked) == 8
    timer = Timed(clock, timer.milliseconds)
    timer.fill(Budget(0))
    assert sorted(timer.asked) == [1, 2, 4]


def test_prompts_that_end_at_once_are_passed_over_for_those_that_go_on(clock):
    timer = Timed(clock, lambda number, width: None if number < 2 else 1.0)
    timer.fill(Budget(0))
    assert all(len(found) == 1 for found in timer.samples.values())


@pytest.mark.parametrize(
    ("milliseconds", "contradicts"),
    [
        ({1: [5.0, 5.1, 4.9], 2: [6.0, 6.1, 5.9], 4: [7.0, 7.1, 6.9]}, False),
        ({1: [5.0, 5.1, 4.9], 2: [4.9, 5.0, 4.8], 4: [7.0, 7.1, 6.9]}, False),  # evened out by 1 %
        ({1: [5.0, 50.0, 9.0, 4.9, 5.1], 2: [6.0, 6.0, 6.0, 6.0, 6.0], 4: [7.0]}, False),  # hiccups
        ({1: [5.0, 9.0, 4.0], 2: [3.0, 5.0, 7.0], 4: [7.0, 7.1, 6.9]}, True),  # however large the noise is
        ({1: [9.0, 9.1, 8.9], 2: [9.0, 9.1, 8.9], 4: [6.0, 6.1, 5.9]}, True),
        ({1: [5.2], 2: [5.0], 4: [7.0]}, False),
        ({1: [9.0], 2: [5.0], 4: []}, True),
    ],
)
def test_more_rows_in_less_time_contradict(clock, milliseconds, contradicts):
    timer = Timed(clock, None)
    for width, times in milliseconds.items():
        timer.samples["short", ("nodes", width)] = list(map(sample, times))
    assert timer.contradicts() == contradicts


@pytest.mark.parametrize(("sweeps", "in_the_end"), [(0, False), (3, False), (99, True)])
def test_a_table_that_contradicts_itself_is_measured_again(clock, monkeypatch, sweeps, in_the_end):
    """Another program slows the machine down while the narrow passes are timed, for so many sweeps."""

    def milliseconds(number, width):
        return 9.0 if number < sweeps and width < 4 else 4.0 + width

    made = []

    def timer(*_):
        made.append(Timed(clock, milliseconds))
        return made[0]

    monkeypatch.setattr(measure, "RoundTimer", timer)
    part = SimpleNamespace(template=((0,),), context_T=torch.tensor([4]))
    traces = {False: SimpleNamespace(sources={"matrix": part}, context_T=part.context_T)}
    timer = measure.timer_of(CalibrateConfig(minutes=100), None, [], traces)
    assert timer.contradicts() == in_the_end
    assert timer.sweeps == {0: 3, 3: 6, 99: 12}[sweeps], "three times three more at most"
    if not in_the_end:
        assert list(map(undisturbed, timer.samples.values())) == [5.0, 6.0, 8.0]


class Shared:
    """A machine that other work takes half of, now and then: what takes a second takes two while it is there.

    Args:
        usual: seconds for which it stays, and stays away, on average.
    """

    def __init__(self, clock, seed, usual):
        self.clock, self.random, self.usual = clock, np.random.default_rng(seed), usual
        self.is_busy, self.until = False, 0.0

    def takes(self, seconds):
        """Passes the time that so much work takes; how many times as long as it would alone."""
        began, left = self.clock.now, seconds
        while left > 0:
            if self.clock.now >= self.until:
                self.is_busy = not self.is_busy
                self.until = self.clock.now + self.random.exponential(self.usual)
            speed = 0.5 if self.is_busy else 1.0
            passed = min(left / speed, max(self.until - self.clock.now, 1e-9))
            self.clock.now += passed
            left -= passed * speed
        return (self.clock.now - began) / seconds


WIDTHS = [1, 2, 4, 8, 16, 32, 64]
COSTS = [20.0, 22.0, 24.0, 27.0, 33.0, 46.0, 72.0]
"""Milliseconds of a pass, by rows; a trees' tokens below, so that 8 rows are best, 4 and 16 behind by 2 to 4 %."""
TOKENS = [1.0, 1.45, 1.84, 2.14, 2.5, 2.75, 2.9]


class TimedOnShared(Timed):
    """A sample is six rounds behind a prompt. Passes vary by 3 % when nothing else runs."""

    def __init__(self, clock, machine):
        super().__init__(clock, None)
        self.machine, self.num_draft_tokens = machine, WIDTHS
        self.samples = {("short", ("nodes", width)): [] for width in WIDTHS}

    def timed(self, run, number, tokens=timer_module.SAMPLE):
        costs = COSTS[WIDTHS.index(run[1][1])] * self.machine.random.normal(1, 0.03, 6)
        self.machine.takes(0.05)
        moments, seconds = [(0, dict.fromkeys(PHASES, 0.0))], 0.0
        for rounds, cost in enumerate(costs, start=1):
            seconds += cost * self.machine.takes(cost / 1e3) / 1e3
            moments.append((rounds, dict.fromkeys(PHASES, 0.0) | {"verify": seconds}))
        return between(moments)


def chosen_within(times, share):
    """Whether the width that these times make the fastest is behind the best one by no more than this share."""
    speeds = [tokens / cost for tokens, cost in zip(TOKENS, COSTS, strict=True)]
    chosen = int(np.argmax([tokens / time for tokens, time in zip(TOKENS, times, strict=True)]))
    return speeds[chosen] > (1 - share) * max(speeds)


def moments_of(*milliseconds: float) -> list[tuple[int, dict[str, float]]]:
    """A prompt that took a second, and rounds."""
    ends = np.cumsum([0.0, *milliseconds]) / 1e3
    return [(number, {"prefill": 1.0, "verify": float(end)}) for number, end in enumerate(ends)]


def test_short_rounds_are_taken_together_until_they_last_for_a_spell():
    """Of some 12 ms two and two, without the one that is left over; of 1 to 3 ms all of a continuation."""
    found = between([(0, {"prefill": 0.0, "verify": 0.0}), *moments_of(12, 16, 10, 11, 12)])
    assert [one["verify"] for one in found] == pytest.approx([14.0, 10.5])
    assert [one["prefill"] for one in found] == [0.0, 0.0]
    found = between([(0, {"prefill": 0.0, "verify": 0.0}), *moments_of(1, 2, 3)])
    assert [one["verify"] for one in found] == pytest.approx([2.0])
    assert between([(0, {"prefill": 0.0, "verify": 0.0}), *moments_of()]) == []


@pytest.mark.parametrize("usual", [0.1, 0.5, 2.0, 10.0])
def test_on_a_machine_slowed_by_half_the_choice_is_within_3_percent_of_the_best(clock, usual):
    """In at least 8 of 10 calibrations, whose share lasts for a sample or two of each plan."""
    good = 0
    for seed in range(10):
        timer = TimedOnShared(clock, Shared(clock, seed, usual))
        timer.measure(Budget(4))
        times = list(map(undisturbed, timer.samples.values()))
        good += chosen_within(timer_module._rising(times), 0.03)
    assert good >= 8


def test_the_pace_is_that_of_the_same_work_against_the_table(clock):
    timer = Timed(clock, lambda number, width: 3.0 * width)
    for width in timer.num_draft_tokens:
        timer.samples["short", ("nodes", width)] = [sample(2.0 * width), sample(2.0 * width), sample(90.0)]
    pace = Pace(timer)
    assert (pace.factor, pace.variation) == (1.0, 0.0)
    for _ in range(6):
        pace.probe()
    assert timer.asked == [1, 4] * 3
    assert pace.factor == pytest.approx(1.5)
    assert pace.variation == pytest.approx(0.0)


def test_the_pace_varies_as_each_work_does_against_itself(clock):
    """Plain rounds of 0.8 to 1.2 ms, wide ones of 8 to 12 ms: quartiles at 0.9 and 1.1 of their medians."""
    times = {1: iter([0.8, 0.9, 1.0, 1.1, 1.2]), 4: iter([12.0, 11.0, 10.0, 9.0, 8.0])}
    pace = Pace(Timed(clock, lambda number, width: next(times[width])))
    for _ in range(10):
        pace.probe()
    assert pace.variation == pytest.approx(0.2)


def test_the_device_is_sampled_now_and_then_in_a_race(clock):
    timer = Timed(clock, lambda number, width: 1.0)
    timer.fill(Budget(0))
    timer.asked.clear()
    track = track_of(Engine(clock, {2: 1.0, 3: 1.0}), pace=Pace(timer))
    for number in range(9):
        track.lap(number, plans_of(2, 3))
    assert len(timer.asked) == 9 * 2 / race_module.RUNS_PER_PROBE


# What is traced, and what the report says.


@pytest.mark.parametrize(
    ("minutes", "temperature", "positions"),
    [(10.0, 0.0, 116), (10.0, 0.7, 58), (0.1, 0.0, 50), (100.0, 0.0, 1196)],
)
def test_so_many_positions_are_traced_as_their_share_of_the_minutes_allows(
    clock, monkeypatch, capsys, minutes, temperature, positions
):
    """A position takes 2 s, the first prompt has 4 of them; two fifths of ten minutes are 240 s."""
    asked = []

    def traced(engine, prompts, settings, positions):
        asked.append(positions)
        clock.now += 8.0
        return range(4)

    monkeypatch.setattr(measure, "record_traces", traced)
    settings = CalibrateConfig(minutes=minutes, temperature=temperature, least_rounds=50, max_new_tokens=101)
    assert measure.affordable(settings, None, [torch.tensor([0])] * 3) == positions
    assert asked == [1]
    assert ("raise it to trace all prompts" in capsys.readouterr().out) == (minutes < 100)


def report_of(**race) -> dict:
    whole = {"laps": 9, "left": ["learned"], "fastest": "learned", "slowness": 1.0, "variation": 0.02}
    return {"race": whole | race, "latency_contradicts": False}


def test_a_steady_and_decided_race_has_nothing_to_excuse():
    assert notes(report_of()) == ["The race took 9 laps; learned was the fastest."]


def test_a_report_says_what_cannot_be_trusted():
    [_, left] = notes(report_of(left=["eagle3", "learned"]))
    assert "before these could be told from it: eagle3." in left
    [_, unsteady] = notes(report_of(variation=0.23))
    assert "varied by 23%" in unsteady
    assert "raise policy.minutes" in unsteady
    [_, table] = notes(report_of() | {"latency_contradicts": True})
    assert "contradicts itself" in table

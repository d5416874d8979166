"""The plan with the most tokens per second, by replay of traces under measured latencies."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from graft_inference import Plan, Stage
from graft_train.calibrate.latency import Latency
from graft_train.calibrate.traces import Traces

RankPaths = tuple[tuple[int, ...], ...]


class Replay:
    """Replays plans over traces.

    Args:
        widths: rows of a verification that may be chosen.
        beam_width: the one the traces were drafted with.
    """

    def __init__(self, traces: Traces, latency: Latency, widths: list[int], beam_width: int) -> None:
        self.traces = traces
        self.latency = latency
        self.widths = sorted(set(widths))
        self.beam_width = beam_width
        self.max_passes = traces.confidence_TP.shape[1]
        self.paths = [_rank_path(ranks) for ranks in traces.successor_rank_TD]
        self._templates: dict[tuple[int, float], RankPaths] = {}
        self._retrieved: dict[RankPaths, np.ndarray] = {}
        ends = np.flatnonzero(np.diff(traces.prompt_T, append=-1)) + 1
        self.spans = list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))

    def accepted(self, stage: Stage) -> np.ndarray:
        """Nodes accepted at every position if its round stopped at this stage, [T]."""
        drafted = np.zeros(len(self.traces.prompt_T), dtype=np.int64)
        if stage.passes and stage.drafted:
            ranks_TP = self.traces.drafted_rank_TPP[:, stage.passes - 1]
            drafted = (ranks_TP <= stage.drafted).sum(axis=1)
        if stage.retrieved:
            # Rows that duplicates free would go to the template's next paths: a lower bound.
            places_TD = self._places(stage.template)
            drafted = np.maximum(drafted, (places_TD < stage.retrieved).sum(axis=1))
        return np.minimum(drafted, self.traces.remaining_T - 1)

    def stops(self, plan: Plan) -> np.ndarray:
        """Index of the stage at which a round at every position stops, [T]."""
        choice_T = np.full(len(self.traces.prompt_T), len(plan.stages) - 1)
        for index in reversed(range(len(plan.stages) - 1)):
            stage = plan.stages[index]
            choice_T[self.traces.confidence_TP[:, stage.passes - 1] <= stage.threshold] = index
        return choice_T

    def run(self, plan: Plan) -> tuple[float, float]:
        """Tokens per second, and tau, of a plan over all traced continuations."""
        choice_T = self.stops(plan)
        gain_T = np.choose(choice_T, [self.accepted(stage) for stage in plan.stages]) + 1
        cost_T = np.array([self.latency.round_ms(stage) for stage in plan.stages])[choice_T]
        gains, costs = gain_T.tolist(), cost_T.tolist()
        tokens, rounds, milliseconds = 0, 0, 0.0
        for start, end in self.spans:
            position = start
            while position < end:
                milliseconds += costs[position]
                rounds += 1
                tokens += gains[position]
                position += gains[position]
        return 1e3 * tokens / milliseconds, tokens / rounds

    def template(self, passes: int, threshold: float) -> RankPaths:
        """Rank paths by how often they lie on the true path where drafting stops at this checkpoint.

        A path is on it no more often than its parent, so any prefix of the list is closed under parents.
        """
        key = (passes, threshold)
        if key not in self._templates:
            paths = self.paths
            if passes:
                stopped_T = self.traces.confidence_TP[:, passes - 1] <= threshold
                paths = [path for path, stopped in zip(paths, stopped_T, strict=True) if stopped]
            counts = Counter(path[:depth] for path in paths for depth in range(1, len(path) + 1))
            ranked = sorted(counts, key=lambda path: (-counts[path], len(path), path))
            # Twice the widest tree: what is over refills the rows of duplicates.
            self._templates[key] = tuple(ranked[: 2 * self.widths[-1]])
        return self._templates[key]

    def _places(self, template: RankPaths) -> np.ndarray:
        """[T, D] place in the template of every prefix of the true rank path."""
        if template not in self._retrieved:
            place = {path: index for index, path in enumerate(template)}
            places_TD = np.full(self.traces.successor_rank_TD.shape, len(template))
            for row, path in enumerate(self.paths):
                for depth in range(1, len(path) + 1):
                    places_TD[row, depth - 1] = place.get(path[:depth], len(template))
            self._retrieved[template] = places_TD
        return self._retrieved[template]


def _rank_path(ranks_D: np.ndarray) -> tuple[int, ...]:
    ranks = ranks_D.tolist()
    return tuple(ranks[: ranks.index(-1)] if -1 in ranks else ranks)


def best_eagle3(replay: Replay) -> Plan:
    """The best tree of drafted nodes alone: passes and rows, tuned as well as Graft's."""
    plans = [
        _plan(replay, Stage(passes, drafted=width - 1))
        for passes in range(1, replay.max_passes + 1)
        for width in replay.widths
        if 1 < width <= 1 + _most_drafted(replay, passes)
    ]
    return max(plans, key=lambda plan: replay.run(plan)[0])


def best_retrieve(replay: Replay) -> Plan:
    """The best tree of retrieved nodes alone."""
    template = replay.template(0, 1.0)
    plans = [
        _plan(replay, Stage(0, retrieved=width - 1, template=template))
        for width in replay.widths
        if 1 < width <= 1 + len(template)
    ]
    return max(plans, key=lambda plan: replay.run(plan)[0])


def best_graft(replay: Replay, checkpoints: int) -> Plan:
    """Both sources under a choice of stages.

    Starts from the best plan with a single stage, adds the checkpoint that gains most while one gains,
    and chooses each stage's rows again after each addition. The result is never predicted to be slower
    than `best_eagle3`, which is among the first.
    """
    singles = [
        _plan(replay, stage) for passes in range(1, replay.max_passes + 1) for stage in _stages(replay, passes, 1.0)
    ]
    best = max(singles, key=lambda plan: replay.run(plan)[0])
    speed = replay.run(best)[0]
    for _ in range(checkpoints):
        grown = max(_additions(replay, best), key=lambda plan: replay.run(plan)[0], default=best)
        grown = _retune(replay, grown)
        grown_speed = replay.run(grown)[0]
        if grown_speed <= speed * 1.002:
            break
        best, speed = grown, grown_speed
    return best


def _additions(replay: Replay, plan: Plan) -> Iterator[Plan]:
    """The plan with one more checkpoint, at every place, threshold and shape."""
    taken = {stage.passes for stage in plan.stages}
    for passes in range(1, replay.max_passes):
        if passes in taken or passes > plan.max_passes:
            continue
        confidence_T = replay.traces.confidence_TP[:, passes - 1]
        for threshold in np.unique(np.quantile(confidence_T, np.arange(0.1, 1.0, 0.1)).round(4)):
            for stage in _stages(replay, passes, float(threshold)):
                stages = sorted((*plan.stages, stage), key=lambda stage: stage.passes)
                yield replace(plan, stages=tuple(stages))


def _retune(replay: Replay, plan: Plan) -> Plan:
    """Chooses every stage's rows again, the others fixed; the last stage's passes too."""
    for index, stage in enumerate(plan.stages):
        last = index == len(plan.stages) - 1
        least = plan.stages[index - 1].passes + 1 if index else 1
        places = range(least, replay.max_passes + 1) if last else [stage.passes]
        variants = [
            replace(plan, stages=(*plan.stages[:index], variant, *plan.stages[index + 1 :]))
            for passes in places
            for variant in _stages(replay, passes, 1.0 if last else stage.threshold)
        ]
        plan = max([plan, *variants], key=lambda variant: replay.run(variant)[0])
    return plan


def _stages(replay: Replay, passes: int, threshold: float) -> Iterator[Stage]:
    """Every split of every width between the two sources."""
    template = replay.template(passes, threshold)
    for width in replay.widths:
        for eighths in range(0, 9):
            drafted = round((width - 1) * eighths / 8)
            retrieved = width - 1 - drafted
            if width > 1 and drafted <= _most_drafted(replay, passes) and retrieved <= len(template):
                yield Stage(passes, threshold, drafted, retrieved, template if retrieved else ())


def _most_drafted(replay: Replay, passes: int) -> int:
    return replay.beam_width + (passes - 1) * replay.beam_width**2


def _plan(replay: Replay, stage: Stage) -> Plan:
    return Plan((stage,), replay.beam_width, max(replay.widths))

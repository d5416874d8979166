"""Replays plans over traces, without the models."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from graft_inference.grafting import score
from graft_inference.policy import Plan, Scale, Stage
from graft_train.calibrate.latency import Latency
from graft_train.calibrate.scale import fit_scale
from graft_train.calibrate.traces import Traces


@dataclass
class Outcome:
    """What a plan's rounds would yield and cost at every position, [T] each.

    Attributes:
        stage_T: index of the stage a round stops at.
        tokens_T: emitted tokens.
        ms_T: time.
    """

    stage_T: np.ndarray
    tokens_T: np.ndarray
    ms_T: np.ndarray


@dataclass
class Table:
    """Trees of one scale, from all that so many passes propose: [T, passes from 0 to P, rows].

    Attributes:
        accepted: nodes on the true path among the best rows - 1, by rows from 1.
        drafted: those of them that the head proposed.
        expected: expected tokens by the scale, the root included.
        promise_T: expected tokens of all retrieved nodes, the root included.
    """

    accepted: Tensor
    drafted: Tensor
    expected: Tensor
    promise_T: Tensor


class Replay:
    """Plans over one set of traces.

    Args:
        budget: most rows of a verification.
        ngrams: whether the retrieved nodes are those of longer contexts; plans must say the same.
    """

    def __init__(self, traces: Traces, latency: Latency, budget: int, ngrams: bool = False) -> None:
        self.traces = traces = traces.of_ngrams() if ngrams else traces
        self.ngrams = ngrams
        self.latency = latency
        self.budget = budget
        self.passes = traces.confidence_TP.shape[1]
        self.beam_width = int((traces.depths_C == 1).sum())
        self.confidence_TP = traces.confidence_TP.numpy()
        self.context_T = traces.context_T.numpy()
        ends = (torch.diff(traces.prompt_T, append=torch.tensor([-1])).nonzero().flatten() + 1).tolist()
        self.spans = list(zip([0, *ends[:-1]], ends, strict=True))
        self.remaining_T = np.concatenate([np.arange(end - start, 0, -1) for start, end in self.spans])
        self._index = {path: row for row, path in enumerate(traces.template)}
        self._true_TC, self._true_TR = self._on_path()
        self._twin_TR = self._twins()
        self._tables: dict[Scale, Table] = {}

    @cached_property
    def fitted(self) -> Scale:
        """The scale that these traces make likeliest."""
        return fit_scale(self.traces)

    def outcome(self, plan: Plan) -> Outcome:
        """Every position as the root of a round of this plan.

        A plan without a scale whose template goes beyond the traced one is met with fewer retrieved nodes.
        """
        assert plan.ngrams == self.ngrams or not plan.retrieves
        stage_T = self._stops(plan)
        tokens, times = [], []
        for stage in plan.stages:
            accepted_T, rows_T = self._accepted(plan, stage)
            tokens.append(np.minimum(accepted_T + 1, self.remaining_T))
            times.append(self.latency.round_ms(plan, stage, rows_T, self.context_T))
        return Outcome(stage_T, np.choose(stage_T, tokens), np.choose(stage_T, times))

    def run(self, plan: Plan) -> tuple[float, float]:
        """Tokens per second, and tau, over all traced continuations."""
        outcome = self.outcome(plan)
        visited = self.visits(outcome)
        tokens, milliseconds = outcome.tokens_T[visited].sum(), outcome.ms_T[visited].sum()
        return 1e3 * float(tokens / milliseconds), float(tokens / len(visited))

    def visits(self, outcome: Outcome, first: int = 0) -> np.ndarray:
        """The positions at which rounds begin, the first one so many tokens into each continuation."""
        steps, visited = outcome.tokens_T.tolist(), []
        for start, end in self.spans:
            position = start + first
            while position < end:
                visited.append(position)
                position += steps[position]
        return np.array(visited)

    def table(self, scale: Scale) -> Table:
        """Every tree this scale would make, to the budget."""
        if scale not in self._tables:
            self._tables[scale] = self._build(scale)
        return self._tables[scale]

    def promise(self, scale: Scale) -> np.ndarray:
        """Expected tokens of all retrieved nodes at every position, the root included, [T]."""
        return self.table(scale).promise_T.numpy()

    def _stops(self, plan: Plan) -> np.ndarray:
        stage_T = np.full(len(self.traces), len(plan.stages) - 1)
        for index in reversed(range(len(plan.stages) - 1)):
            stage = plan.stages[index]
            if stage.passes:
                stage_T[self.confidence_TP[:, stage.passes - 1] <= np.float32(stage.threshold)] = index
            elif plan.scale:
                stage_T[self.promise(plan.scale) > np.float32(stage.threshold)] = index
        return stage_T

    def _accepted(self, plan: Plan, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """Accepted nodes and rows of a round that stops at this stage, [T] each."""
        if plan.scale is None:
            return self._accepted_by_quota(stage), np.full(len(self.traces), stage.rows)
        table = self.table(plan.scale)
        width_T = self._widths(table, stage)
        accepted = table.drafted if plan.drafted_only else table.accepted
        accepted_T = accepted[:, stage.passes].gather(1, width_T[:, None] - 1)[:, 0]
        return accepted_T.numpy(), width_T.numpy()

    def _widths(self, table: Table, stage: Stage) -> Tensor:
        widths = torch.tensor(stage.widths)
        if len(widths) == 1:
            return widths.expand(len(self.traces))
        worth_TW = table.expected[:, stage.passes, widths - 1] - torch.tensor(stage.prices)
        return widths[worth_TW.argmax(dim=1)]

    def _accepted_by_quota(self, stage: Stage) -> np.ndarray:
        """The best drafted nodes by log-probability, then the first new retrieved ones of the template."""
        traces = self.traces
        logp_TC = traces.logp_TC.masked_fill(traces.depths_C > stage.passes, -torch.inf)
        order_TC = logp_TC.sort(dim=1, descending=True, stable=True).indices[:, : stage.drafted]
        kept_TC = torch.zeros_like(logp_TC, dtype=torch.bool).scatter_(1, order_TC, True)
        accepted_T = (kept_TC & self._true_TC).sum(dim=1)
        rows = torch.tensor([self._index[path] for path in stage.template if path in self._index], dtype=torch.long)
        if stage.retrieved and len(rows):
            twin_TR = self._twin_TR[:, rows]
            repeated_TR = (twin_TR >= 0) & kept_TC.gather(1, twin_TR.clamp(min=0))
            new_TR = ~repeated_TR & (traces.retrieved_TR[:, rows] >= 0)
            new_TR &= new_TR.cumsum(dim=1) <= stage.retrieved
            accepted_T += (new_TR & self._true_TR[:, rows]).sum(dim=1)
        return accepted_T.numpy()

    def _on_path(self) -> tuple[Tensor, Tensor]:
        """Which candidates lie on the continuation itself."""
        traces = self.traces
        true_TC = traces.tokens_TC == traces.truth_TD[:, traces.depths_C - 1]
        start = self.beam_width
        for _ in range(2, self.passes + 1):
            end = start + self.beam_width**2
            true_TC[:, start:end] &= true_TC.gather(1, traces.parents_TC[:, start:end].long())
            start = end
        depths_R = (traces.template_RL >= 0).sum(dim=1)
        true_TR = traces.retrieved_TR == traces.truth_TD[:, depths_R - 1]
        for path, row in self._index.items():
            if len(path) > 1:
                true_TR[:, row] &= true_TR[:, self._index[path[:-1]]]
        return true_TC, true_TR

    def _twins(self) -> Tensor:
        """[T, R] the drafted candidate that a retrieved one repeats; -1: none."""
        traces = self.traces
        keys_TC, keys_TR = traces.tokens_TC.long() + 1, traces.retrieved_TR.long() + 1
        start = self.beam_width
        for _ in range(2, self.passes + 1):
            end = start + self.beam_width**2
            keys_TC[:, start:end] += _spread(keys_TC.gather(1, traces.parents_TC[:, start:end].long()))
            start = end
        for path, row in self._index.items():
            if len(path) > 1:
                keys_TR[:, row] += _spread(keys_TR[:, self._index[path[:-1]]])
        twins = []
        for start, end in self.spans:  # one prompt at a time: this is positions x R x C
            same = keys_TR[start:end, :, None] == keys_TC[start:end, None]
            found, twin = same.to(torch.uint8).max(dim=2)
            twins.append(torch.where((found > 0) & (traces.retrieved_TR[start:end] >= 0), twin, -1))
        return torch.cat(twins)

    def _build(self, scale: Scale) -> Table:
        traces = self.traces
        drafted = torch.tensor([(1.0, 0.0), *scale.drafted])[traces.depths_C] if scale.drafted else None
        score_TC = torch.full_like(traces.logp_TC, -torch.inf) if drafted is None else score(drafted, traces.logp_TC)
        score_TR = torch.full_like(traces.retrieved_logp_TR, -torch.inf)
        rows = torch.tensor([self._index[path] for path in scale.template], dtype=torch.long)
        if len(rows):
            depths = torch.tensor([len(path) for path in scale.template])
            table = torch.tensor([(1.0, 0.0), *scale.retrieved])[depths]
            score_TR[:, rows] = score(table, traces.retrieved_logp_TR[:, rows])
        found_TR = score_TR > -torch.inf
        parts = [self._trees(passes, score_TC, score_TR, found_TR) for passes in range(self.passes + 1)]
        promise_T = 1 + score_TR.exp().sum(dim=1)
        accepted, by_head, expected = (torch.stack(column, dim=1) for column in zip(*parts, strict=True))
        return Table(accepted, by_head, expected, promise_T)

    def _trees(self, passes: int, score_TC: Tensor, score_TR: Tensor, found_TR: Tensor) -> tuple[Tensor, ...]:
        """accepted, drafted and expected by rows, as in `Table`, for one number of passes."""
        count = int((self.traces.depths_C <= passes).sum())
        twin_TR = torch.where(found_TR & (self._twin_TR < count), self._twin_TR, -1)
        repeated_TR = twin_TR >= 0
        # A repeated node takes its better score; a column past the end collects the rest.
        best_TC = torch.cat((score_TC[:, :count], torch.full((len(score_TC), 1), -torch.inf)), dim=1)
        best_TC = best_TC.scatter_reduce(1, torch.where(repeated_TR, twin_TR, count), score_TR, "amax")[:, :count]
        pool = torch.cat((best_TC, score_TR.masked_fill(repeated_TR, -torch.inf)), dim=1)
        ordered = pool.sort(dim=1, descending=True, stable=True)
        chosen, values = ordered.indices[:, : self.budget - 1], ordered.values[:, : self.budget - 1]
        true = torch.cat((self._true_TC[:, :count], self._true_TR), dim=1).gather(1, chosen)
        true &= values > -torch.inf
        root = torch.zeros(len(pool), 1)
        counted = (torch.cat((root.bool(), part), dim=1).cumsum(1) for part in (true, true & (chosen < count)))
        expected = torch.cat((root, values), dim=1).exp().cumsum(1)
        return tuple(_to_budget(part, self.budget) for part in (*counted, expected))


def _spread(keys: Tensor) -> Tensor:
    return keys * 6364136223846793005


def _to_budget(values: Tensor, budget: int) -> Tensor:
    """By rows from 1: the last value repeats where the pool ends."""
    return torch.cat((values, values[:, -1:].expand(-1, budget - values.shape[1])), dim=1)

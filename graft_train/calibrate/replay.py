"""Replays plans over traces, without the models."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from graft_inference.policy.plan import Plan, Scale, Stage
from graft_inference.tree import PATH_BASE
from graft_train.calibrate.latency import Latency
from graft_train.calibrate.scale import drafted_scores, echo_scores, fit_scale, retrieved_scores
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
        promise_T: expected tokens of all nodes of the retrieved source that promises most, the root included.
    """

    accepted: Tensor
    drafted: Tensor
    promise_T: Tensor


class Replay:
    """Plans over one set of traces.

    Args:
        budget: most rows of a verification.
        ngrams: whether the retrieved nodes are those of longer contexts; plans must say the same.
        shares_noise: whether the traces were recorded so; plans must say the same.
    """

    def __init__(
        self, traces: Traces, latency: Latency, budget: int, ngrams: bool = False, shares_noise: bool = False
    ) -> None:
        self.traces = traces = traces.of_ngrams() if ngrams else traces
        self.ngrams = ngrams
        self.shares_noise = shares_noise
        self.latency = latency
        self.budget = budget
        self.passes = traces.confidence_TP.shape[1]
        self.topk = int((traces.depths_C == 1).sum())
        self.confidence_TP = traces.confidence_TP.numpy()
        self.context_T = traces.context_T.numpy()
        ends = (torch.diff(traces.prompt_T, append=torch.tensor([-1])).nonzero().flatten() + 1).tolist()
        self.spans = list(zip([0, *ends[:-1]], ends, strict=True))
        self.remaining_T = np.concatenate([np.arange(end - start, 0, -1) for start, end in self.spans])
        self._index = {path: row for row, path in enumerate(traces.template)}
        self._true_TC, self._true_TR = self._on_path()
        self._true_TE = self._echo_on_path()
        self._keys = self._path_keys()
        self._pools: dict[int, tuple[Tensor, Tensor]] = {}
        self._tables: dict[Scale, Table] = {}
        self._runs: dict[Plan, tuple[float, float]] = {}

    @cached_property
    def fitted(self) -> Scale:
        """The scale fitted to these traces."""
        return fit_scale(self.traces)

    def outcome(self, plan: Plan) -> Outcome:
        """Every position as the root of a round of this plan.

        A plan without a scale whose template goes beyond the traced one is met with fewer retrieved nodes.
        """
        assert plan.ngrams == self.ngrams or not plan.expands
        assert plan.shares_noise == self.shares_noise or not (plan.expands or plan.drafts)
        stage_T = self._stops(plan)
        tokens, times = [], []
        for stage in plan.stages:
            tokens.append(np.minimum(self._accepted(plan, stage) + 1, self.remaining_T))
            times.append(self.latency.round_ms(plan, stage, self.context_T))
        return Outcome(stage_T, np.choose(stage_T, tokens), np.choose(stage_T, times))

    def run(self, plan: Plan) -> tuple[float, float]:
        """Tokens per second, and acceptance length, over all traced continuations."""
        if plan not in self._runs:
            outcome = self.outcome(plan)
            visited = self.visits(outcome)
            tokens, milliseconds = outcome.tokens_T[visited].sum(), outcome.ms_T[visited].sum()
            self._runs[plan] = 1e3 * float(tokens / milliseconds), float(tokens / len(visited))
        return self._runs[plan]

    def visits(self, outcome: Outcome, first: int = 0) -> np.ndarray:
        """The positions at which rounds begin, the first one so many tokens into each continuation."""
        steps, visited = outcome.tokens_T.tolist(), []
        for start, end in self.spans:
            position = start + first
            while position < end:
                visited.append(position)
                position += steps[position]
        return np.array(visited, dtype=np.int64)

    def table(self, scale: Scale) -> Table:
        """Every tree this scale would make, to the budget."""
        if scale not in self._tables:
            self._tables[scale] = self._build(scale)
        return self._tables[scale]

    def promise(self, scale: Scale) -> np.ndarray:
        """What decides whether the head is asked at every position, [T]; see `Table.promise_T`."""
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

    def _accepted(self, plan: Plan, stage: Stage) -> np.ndarray:
        """Accepted nodes of a round that stops at this stage, [T]."""
        if plan.scale is None:
            return self._accepted_by_quota(stage)
        table = self.table(plan.scale)
        accepted = table.drafted if plan.drafted_only else table.accepted
        return accepted[:, stage.passes, stage.width - 1].numpy()

    def _accepted_by_quota(self, stage: Stage) -> np.ndarray:
        """The best drafted nodes by log-probability, then the first new retrieved ones of the template."""
        traces = self.traces
        logp_TC = traces.logp_TC.masked_fill(traces.depths_C > stage.passes, -torch.inf)
        order_TC = logp_TC.sort(dim=1, descending=True, stable=True).indices[:, : stage.drafted]
        kept_TC = torch.zeros_like(logp_TC, dtype=torch.bool).scatter_(1, order_TC, True)
        accepted_T = (kept_TC & self._true_TC).sum(dim=1)
        rows = torch.tensor([self._index[path] for path in stage.template if path in self._index], dtype=torch.long)
        if stage.retrieved and len(rows):
            count = len(traces.depths_C)
            twin_TR = self._pool(self.passes)[0][:, count : count + len(traces.template)][:, rows]
            repeated_TR = (twin_TR < count) & kept_TC.gather(1, twin_TR.clamp(max=count - 1))
            new_TR = ~repeated_TR & (traces.retrieved_TR[:, rows] >= 0)
            new_TR &= new_TR.cumsum(dim=1) <= stage.retrieved
            accepted_T += (new_TR & self._true_TR[:, rows]).sum(dim=1)
        return accepted_T.numpy()

    def _on_path(self) -> tuple[Tensor, Tensor]:
        """Which candidates lie on the continuation itself."""
        traces = self.traces
        true_TC = traces.tokens_TC == traces.truth_TD[:, traces.depths_C - 1]
        start = self.topk
        for _ in range(2, self.passes + 1):
            end = start + self.topk**2
            true_TC[:, start:end] &= true_TC.gather(1, traces.parents_TC[:, start:end].long())
            start = end
        depths_R = (traces.template_RL >= 0).sum(dim=1)
        true_TR = traces.retrieved_TR == traces.truth_TD[:, depths_R - 1]
        for path, row in self._index.items():
            if len(path) > 1:
                true_TR[:, row] &= true_TR[:, self._index[path[:-1]]]
        return true_TC, true_TR

    def _echo_on_path(self) -> Tensor:
        traces = self.traces
        same_TE = traces.echo_TE == traces.truth_TD[:, : traces.echo_TE.shape[1]]
        return (same_TE & (traces.matched_T > 0)[:, None]).cumprod(dim=1).bool()

    def _path_keys(self) -> tuple[Tensor, Tensor]:
        """Keys of the token paths of the drafted candidates, [T, C], and of all retrieved ones, [T, R + E]."""
        traces = self.traces
        keys_TC, keys_TR = traces.tokens_TC.long() + 1, traces.retrieved_TR.long() + 1
        start = self.topk
        for _ in range(2, self.passes + 1):
            end = start + self.topk**2
            keys_TC[:, start:end] += _spread(keys_TC.gather(1, traces.parents_TC[:, start:end].long()))
            start = end
        for path, row in self._index.items():
            if len(path) > 1:
                keys_TR[:, row] += _spread(keys_TR[:, self._index[path[:-1]]])
        keys_TE = traces.echo_TE.long() + 1
        for depth in range(1, keys_TE.shape[1]):
            keys_TE[:, depth] += _spread(keys_TE[:, depth - 1])
        # What was not found has no twin: a key of its own.
        own_R = -torch.arange(1, keys_TR.shape[1] + 1)
        return keys_TC, torch.cat((torch.where(traces.retrieved_TR >= 0, keys_TR, own_R), keys_TE), dim=1)

    def _pool(self, passes: int) -> tuple[Tensor, Tensor]:
        """Of what so many passes propose and all that is retrieved, [T, N]: the first with the same path; the true."""
        if passes not in self._pools:
            count = int((self.traces.depths_C <= passes).sum())
            keys_TN = torch.cat((self._keys[0][:, :count], self._keys[1]), dim=1)
            true_TN = torch.cat((self._true_TC[:, :count], self._true_TR, self._true_TE), dim=1)
            ordered = keys_TN.sort(dim=1, stable=True)
            new_TN = torch.ones_like(true_TN)
            new_TN[:, 1:] = ordered.values[:, 1:] != ordered.values[:, :-1]
            place_TN = torch.where(new_TN, torch.arange(keys_TN.shape[1]), 0).cummax(dim=1).values
            first_TN = torch.empty_like(keys_TN).scatter_(1, ordered.indices, ordered.indices.gather(1, place_TN))
            self._pools[passes] = first_TN, true_TN
        return self._pools[passes]

    def _build(self, scale: Scale) -> Table:
        traces = self.traces
        nothing_TC = torch.full_like(traces.logp_TC, -torch.inf)
        score_TC = drafted_scores(traces, scale) if scale.drafted else nothing_TC
        score_TR = retrieved_scores(traces, scale)
        score_TE = echo_scores(traces, scale)
        retrieved = torch.cat((score_TR, score_TE), dim=1)
        parts = [self._trees(passes, score_TC, retrieved) for passes in range(self.passes + 1)]
        promise_T = 1 + torch.maximum(score_TR.exp().sum(dim=1), score_TE.exp().sum(dim=1))
        accepted, by_head = (torch.stack(column, dim=1) for column in zip(*parts, strict=True))
        return Table(accepted, by_head, promise_T)

    def _trees(self, passes: int, score_TC: Tensor, retrieved: Tensor) -> tuple[Tensor, ...]:
        """accepted and drafted by rows, as in `Table`, for one number of passes."""
        first_TN, true_TN = self._pool(passes)
        count = int((self.traces.depths_C <= passes).sum())
        score_TN = torch.cat((score_TC[:, :count], retrieved), dim=1)
        # A repeated node takes its better score, and the place of the first.
        pool = torch.full_like(score_TN, -torch.inf).scatter_reduce(1, first_TN, score_TN, "amax")
        ordered = pool.sort(dim=1, descending=True, stable=True)
        chosen, values = ordered.indices[:, : self.budget - 1], ordered.values[:, : self.budget - 1]
        true = true_TN.gather(1, chosen) & (values > -torch.inf)
        root = torch.zeros(len(pool), 1, dtype=torch.bool)
        counted = (torch.cat((root, part), dim=1).cumsum(1) for part in (true, true & (chosen < count)))
        return tuple(_to_budget(part, self.budget) for part in counted)


Replays = dict[tuple[bool, bool], Replay]
"""By what plans say of `shares_noise` and `ngrams`."""


def replay_of(replays: Replays, plan: Plan) -> Replay:
    """The one whose traces show what this plan meets."""
    return replays[plan.shares_noise, plan.ngrams]


def _spread(keys: Tensor) -> Tensor:
    return keys * PATH_BASE


def _to_budget(values: Tensor, budget: int) -> Tensor:
    """By rows from 1: the last value repeats where the pool ends."""
    return torch.cat((values, values[:, -1:].expand(-1, budget - values.shape[1])), dim=1)

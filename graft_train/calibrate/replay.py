"""Replays plans over traces, without the models."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from graft_inference import AcceptanceModel, ChainPlan, Plan, QuotaCheckpoint, ScoredPlan
from graft_inference.tree import PATH_BASE
from graft_train.calibrate.fit import drafted_scores, fit_acceptance, source_scores
from graft_train.calibrate.latency import Latency
from graft_train.calibrate.traces import SourceTraces, Traces


@dataclass
class Outcome:
    """What a plan's rounds would yield and cost at every position, [T] each.

    Attributes:
        checkpoint_T: index of the checkpoint a round stops at.
        tokens_T: emitted tokens.
        ms_T: time.
    """

    checkpoint_T: np.ndarray
    tokens_T: np.ndarray
    ms_T: np.ndarray


class Replay:
    """Plans over one set of traces.

    Args:
        budget: most nodes of a verification.
        shares_noise: whether the traces were recorded so; plans must say the same.
    """

    def __init__(self, traces: Traces, latency: Latency, budget: int, shares_noise: bool = False) -> None:
        self.traces = traces
        self.shares_noise = shares_noise
        self.latency = latency
        self.budget = budget
        self.num_steps = traces.confidence_TP.shape[1]
        self.topk = int((traces.depths_C == 1).sum())
        self.confidence_TP = traces.confidence_TP.numpy()
        self.context_T = traces.context_T.numpy()
        ends = (torch.diff(traces.prompt_T, append=torch.tensor([-1])).nonzero().flatten() + 1).tolist()
        self.spans = list(zip([0, *ends[:-1]], ends, strict=True))
        self.remaining_T = np.concatenate([np.arange(end - start, 0, -1) for start, end in self.spans])
        self._true_TC, self._keys_TC = self._drafted_paths()
        retrieved = [_paths(source, traces.truth_TD) for source in traces.sources.values()]
        self._true_TR, self._keys_TR = (torch.cat(columns, dim=1) for columns in zip(*retrieved, strict=True))
        # What was not found has no twin: a key of its own.
        own_R = -torch.arange(1, self._keys_TR.shape[1] + 1)
        none_TR = torch.cat([source.tokens_TR < 0 for source in traces.sources.values()], dim=1)
        self._keys_TR = torch.where(none_TR, own_R, self._keys_TR)
        self._pools: dict[int, tuple[Tensor, Tensor]] = {}
        self._trees: dict[tuple[AcceptanceModel, bool], Tensor] = {}
        self._promises: dict[AcceptanceModel, np.ndarray] = {}
        self._runs: dict[Plan, tuple[float, float]] = {}

    @cached_property
    def fitted(self) -> AcceptanceModel:
        """The acceptance model fitted to these traces."""
        return fit_acceptance(self.traces)

    def outcome(self, plan: Plan) -> Outcome:
        """Every position as the root of a round of this plan.

        A plan of quotas whose template goes beyond the traced one is met with fewer retrieved nodes.
        """
        assert plan.shares_noise == self.shares_noise or not (plan.sources or plan.drafts)
        checkpoint_T = self._stops(plan)
        tokens, times = [], []
        for checkpoint in plan.checkpoints:
            tokens.append(np.minimum(self._accepted(plan, checkpoint) + 1, self.remaining_T))
            times.append(self.latency.round_ms(plan, checkpoint, self.context_T))
        return Outcome(checkpoint_T, np.choose(checkpoint_T, tokens), np.choose(checkpoint_T, times))

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

    def accepted(self, plan: ScoredPlan) -> Tensor:
        """Nodes on the continuation, of every tree or chain that plans of its kind and acceptance model would make.

        Returns:
            By draft steps and nodes, the root included: [T, steps from 0 to P, nodes from 1 to the budget].
        """
        model, chains = plan.acceptance, isinstance(plan, ChainPlan)
        if (model, chains) not in self._trees:
            self._trees[model, chains] = self._build(model, self._chains if chains else self._best)
        return self._trees[model, chains]

    def promise(self, model: AcceptanceModel) -> np.ndarray:
        """What decides whether the head is asked at every position, [T]: the expected tokens of all nodes of the source
        that promises most, the root included."""
        if model not in self._promises:
            scores = self._retrieved_scores(model)
            promise_T = 1 + torch.stack([score_TR.exp().sum(dim=1) for score_TR in scores]).amax(dim=0)
            self._promises[model] = promise_T.numpy()
        return self._promises[model]

    def _stops(self, plan: Plan) -> np.ndarray:
        checkpoint_T = np.full(len(self.traces), len(plan.checkpoints) - 1)
        for index in reversed(range(len(plan.checkpoints) - 1)):
            one = plan.checkpoints[index]
            if one.steps:
                checkpoint_T[self.confidence_TP[:, one.steps - 1] <= np.float32(one.threshold)] = index
            elif isinstance(plan, ScoredPlan):
                checkpoint_T[self.promise(plan.acceptance) > np.float32(one.threshold)] = index
        return checkpoint_T

    def _accepted(self, plan: Plan, checkpoint: Any) -> np.ndarray:
        """Accepted nodes of a round that stops at this checkpoint, [T]."""
        if not isinstance(plan, ScoredPlan):
            return self._accepted_by_quota(checkpoint)
        return self.accepted(plan)[:, checkpoint.steps, checkpoint.num_draft_tokens - 1].numpy()

    def _accepted_by_quota(self, checkpoint: QuotaCheckpoint) -> np.ndarray:
        """The best drafted nodes by log-probability, then the first new ones of the matrix's template."""
        traces = self.traces
        logp_TC = traces.logp_TC.masked_fill(traces.depths_C > checkpoint.steps, -torch.inf)
        order_TC = logp_TC.sort(dim=1, descending=True, stable=True).indices[:, : checkpoint.drafted]
        kept_TC = torch.zeros_like(logp_TC, dtype=torch.bool).scatter_(1, order_TC, True)
        accepted_T = (kept_TC & self._true_TC).sum(dim=1)
        first = 0
        for name, source in traces.sources.items():
            if name == "matrix":
                break
            first += source.tokens_TR.shape[1]
        index = {path: first + row for row, path in enumerate(traces.sources["matrix"].template)}
        rows = torch.tensor([index[path] for path in checkpoint.template if path in index], dtype=torch.long)
        if checkpoint.retrieved and len(rows):
            count = len(traces.depths_C)
            twin_TR = self._pool(self.num_steps)[0][:, count + rows]
            repeated_TR = (twin_TR < count) & kept_TC.gather(1, twin_TR.clamp(max=count - 1))
            new_TR = ~repeated_TR & (self._keys_TR[:, rows] != -1 - rows)
            new_TR &= new_TR.cumsum(dim=1) <= checkpoint.retrieved
            accepted_T += (new_TR & self._true_TR[:, rows]).sum(dim=1)
        return accepted_T.numpy()

    def _drafted_paths(self) -> tuple[Tensor, Tensor]:
        """Of the drafted candidates: which lie on the continuation itself, and keys of their token paths, [T, C]."""
        traces = self.traces
        true_TC = traces.tokens_TC == traces.truth_TD[:, traces.depths_C - 1]
        keys_TC = traces.tokens_TC.long() + 1
        start = self.topk
        for _ in range(2, self.num_steps + 1):
            end = start + self.topk**2
            parents_TC = traces.parents_TC[:, start:end].long()
            true_TC[:, start:end] &= true_TC.gather(1, parents_TC)
            keys_TC[:, start:end] += keys_TC.gather(1, parents_TC) * PATH_BASE
            start = end
        return true_TC, keys_TC

    def _pool(self, steps: int) -> tuple[Tensor, Tensor]:
        """Of what so many steps propose and all that is retrieved, [T, N]: the first with the same path; the true."""
        if steps not in self._pools:
            count = int((self.traces.depths_C <= steps).sum())
            keys_TN = torch.cat((self._keys_TC[:, :count], self._keys_TR), dim=1)
            true_TN = torch.cat((self._true_TC[:, :count], self._true_TR), dim=1)
            ordered = keys_TN.sort(dim=1, stable=True)
            new_TN = torch.ones_like(true_TN)
            new_TN[:, 1:] = ordered.values[:, 1:] != ordered.values[:, :-1]
            place_TN = torch.where(new_TN, torch.arange(keys_TN.shape[1]), 0).cummax(dim=1).values
            first_TN = torch.empty_like(keys_TN).scatter_(1, ordered.indices, ordered.indices.gather(1, place_TN))
            self._pools[steps] = first_TN, true_TN
        return self._pools[steps]

    def _build(self, model: AcceptanceModel, choose: Callable[[int, Tensor], Tensor]) -> Tensor:
        """`accepted`. `choose` has it of so many steps from the scores of the pool, [T, N]."""
        score_TC = torch.full_like(self.traces.logp_TC, -torch.inf)
        if model.drafted:
            score_TC = drafted_scores(self.traces, model)
        retrieved_TR = torch.cat(self._retrieved_scores(model), dim=1)
        accepted = []
        for steps in range(self.num_steps + 1):
            count = int((self.traces.depths_C <= steps).sum())
            score_TN = torch.cat((score_TC[:, :count], retrieved_TR), dim=1)
            # A repeated node takes its better score, and the place of the first.
            first_TN = self._pool(steps)[0]
            pool_TN = torch.full_like(score_TN, -torch.inf).scatter_reduce(1, first_TN, score_TN, "amax")
            accepted.append(_to_budget(F.pad(choose(steps, pool_TN), (1, 0)), self.budget))
        return torch.stack(accepted, dim=1)

    def _retrieved_scores(self, model: AcceptanceModel) -> list[Tensor]:
        models = {source.name: source for source in model.sources}
        return [source_scores(source, models.get(name)) for name, source in self.traces.sources.items()]

    def _best(self, steps: int, pool_TN: Tensor) -> Tensor:
        """Accepted nodes among the best 1, 2, ... (`DraftTree.chosen`)."""
        ordered = pool_TN.sort(dim=1, descending=True, stable=True)
        chosen, values = ordered.indices[:, : self.budget - 1], ordered.values[:, : self.budget - 1]
        true = self._pool(steps)[1].gather(1, chosen) & (values > -torch.inf)
        return true.cumsum(1)

    def _chains(self, steps: int, pool_TN: Tensor) -> Tensor:
        """Accepted nodes of the best path of at most 1, 2, ... nodes (`tree.best_chain`)."""
        first_TN, true_TN = self._pool(steps)
        parents_TN, depths_N = self._parents(steps)
        # Column 0 is the root's, which is its own parent.
        jump_TN = F.pad(1 + first_TN, (1, 0)).gather(1, F.pad(1 + parents_TN, (1, 0)))
        expected_TN, accepted_TN = F.pad(pool_TN.exp(), (1, 0)), F.pad(true_TN.long(), (1, 0))
        reach, deepest = 1, int(depths_N.max())
        while reach < deepest:
            expected_TN = expected_TN + expected_TN.gather(1, jump_TN)
            accepted_TN = accepted_TN + accepted_TN.gather(1, jump_TN)
            jump_TN = jump_TN.gather(1, jump_TN)
            reach *= 2
        columns = []
        for most in range(1, min(self.budget - 1, deepest) + 1):
            out_TN = F.pad((pool_TN == -torch.inf) | (depths_N > most), (1, 0))
            columns.append(accepted_TN.gather(1, expected_TN.masked_fill(out_TN, -1.0).argmax(dim=1, keepdim=True)))
        return torch.cat(columns, dim=1)

    def _parents(self, steps: int) -> tuple[Tensor, Tensor]:
        """The pool's columns of the parents, -1 for the root's children, [T, N]; and depths, [N]."""
        count = int((self.traces.depths_C <= steps).sum())
        retrieved, depths, start = [], [self.traces.depths_C[:count].long()], count
        for source in self.traces.sources.values():
            columns = {path: start + row for row, path in enumerate(source.template)} | {(): -1}
            retrieved += [columns[path[:-1]] for path in source.template]
            depths.append((source.template_RL >= 0).sum(dim=1))
            start += len(source.template)
        parents_TR = torch.tensor(retrieved).expand(len(self.traces), -1)
        return torch.cat((self.traces.parents_TC[:, :count].long(), parents_TR), dim=1), torch.cat(depths)


Replays = dict[bool, Replay]
"""By what plans say of `shares_noise`."""


def replay_of(replays: Replays, plan: Plan) -> Replay:
    """The one whose traces show what this plan meets."""
    return replays[plan.shares_noise]


def _paths(source: SourceTraces, truth_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Of a source's candidates: which lie on the continuation itself, and keys of their token paths, [T, R]."""
    depths_R = (source.template_RL >= 0).sum(dim=1)
    true_TR = (source.tokens_TR == truth_TD[:, depths_R - 1]) & (source.tokens_TR >= 0)
    keys_TR = source.tokens_TR.long() + 1
    index = {path: row for row, path in enumerate(source.template)}
    for path, row in index.items():
        if len(path) > 1:
            parent = index[path[:-1]]
            true_TR[:, row] &= true_TR[:, parent]
            keys_TR[:, row] += keys_TR[:, parent] * PATH_BASE
    return true_TR, keys_TR


def _to_budget(values: Tensor, budget: int) -> Tensor:
    """By nodes from 1: the last value repeats where the pool ends."""
    return torch.cat((values, values[:, -1:].expand(-1, budget - values.shape[1])), dim=1)


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

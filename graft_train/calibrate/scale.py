"""P(accepted) of a candidate from its source's probability of every step, its depth, rank and source."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from graft_inference.echo import LONGEST
from graft_inference.grafting import LEAST, calibrated
from graft_inference.policy import Scale
from graft_train.calibrate.traces import Traces

RIDGE = 5.0
"""Pull of each depth towards the one above it, of ranks towards each other: as of so many observations."""
NO_FAITH = 10.0
"""Matches seen fewer times than this are trusted little more than shorter ones."""
MOST_STEPS = 200_000
LEAST_REACH = 1e-3
"""Steps from parents less likely than this do not enter a fit, and P(accepted) does not fall below it in echoes."""


@dataclass
class Steps:
    """Steps from nodes that may be accepted to their children.

    Attributes:
        logit: of the source's probability of the step.
        depth, rank: of the child.
        reach: P(accepted) of the parent.
        share: P(child accepted | parent accepted).
    """

    logit: Tensor
    depth: Tensor
    rank: Tensor
    reach: Tensor
    share: Tensor


def fit_scale(traces: Traces, prompts: Tensor | None = None) -> Scale:
    """The scale that makes the traces likeliest: logistic regressions, each depth drawn to the one above it.

    Args:
        prompts: fit on these prompts alone.
    """
    kept_T = torch.ones(len(traces), dtype=torch.bool) if prompts is None else torch.isin(traces.prompt_T, prompts)
    above_TC, reach_TC = _above(traces.logp_TC, traces.parents_TC), _above(traces.reach_TC, traces.parents_TC, 1.0)
    rank_C = torch.zeros_like(traces.depths_C)
    drafted, _ = _fit(
        _steps(traces.logp_TC - above_TC, traces.depths_C, rank_C, reach_TC, traces.reach_TC, kept_T),
        int(traces.depths_C.max()),
        1,
    )
    depths_R, parents_R, rank_R = template_columns(traces)
    parents_TR = parents_R.expand_as(traces.reach_TR)
    above_TR, reach_TR = _above(traces.retrieved_logp_TR, parents_TR), _above(traces.reach_TR, parents_TR, 1.0)
    step_TR = traces.retrieved_logp_TR - above_TR
    reach_TR = reach_TR.masked_fill(traces.retrieved_TR < 0, 0.0)
    retrieved, ranks = _fit(
        _steps(step_TR, depths_R, rank_R, reach_TR, traces.reach_TR, kept_T),
        traces.template_RL.shape[1],
        int(rank_R.max()) + 1,
    )
    return Scale(drafted, retrieved, ranks, traces.template, _fit_echo(traces, kept_T))


def raw_scale(traces: Traces) -> Scale:
    """Each source's own probabilities, taken at their word; an echo has none, and keeps what is fitted."""
    one = ((1.0, 0.0),)
    ranks = (0.0,) * (int(traces.template_RL.max()) + 1)
    depths = int(traces.depths_C.max()), traces.template_RL.shape[1]
    echo = _fit_echo(traces, torch.ones(len(traces), dtype=torch.bool))
    return Scale(one * depths[0], one * depths[1], ranks, traces.template, echo)


def template_columns(traces: Traces) -> tuple[Tensor, Tensor, Tensor]:
    """Depth, parent's row (-1: the root) and last rank of each rank path, [R]."""
    rows = {path: row for row, path in enumerate(traces.template)}
    parents = [rows.get(path[:-1], -1) for path in rows]
    depths_R = (traces.template_RL >= 0).sum(dim=1)
    return depths_R, torch.tensor(parents, dtype=torch.long), torch.tensor([path[-1] for path in rows])


def drafted_scores(traces: Traces, scale: Scale) -> Tensor:
    """log P(accepted) of every drafted candidate, [T, C]."""
    step_TC = traces.logp_TC - _above(traces.logp_TC, traces.parents_TC)
    score_TC = calibrated(torch.tensor([(1.0, 0.0), *scale.drafted])[traces.depths_C], step_TC)
    for depth in range(2, int(traces.depths_C.max()) + 1):
        here_C = (traces.depths_C == depth).nonzero()[:, 0]
        score_TC[:, here_C] += score_TC.gather(1, traces.parents_TC[:, here_C].long())
    return score_TC


def retrieved_scores(traces: Traces, scale: Scale) -> Tensor:
    """log P(accepted) of every retrieved candidate in the scale's template, [T, R]; -inf for others."""
    logp_TR = traces.retrieved_logp_TR
    if not scale.template:
        return torch.full_like(logp_TR, -torch.inf)
    depths_R, parents_R, rank_R = template_columns(traces)
    wanted = set(scale.template)
    chosen_R = torch.tensor([path in wanted for path in traces.template], dtype=torch.bool)
    step_TR = logp_TR - _above(logp_TR, parents_R.expand_as(logp_TR))
    ranks = torch.tensor([*scale.ranks, *[0.0] * (int(rank_R.max()) + 1 - len(scale.ranks))])
    table_R2 = torch.tensor([(1.0, 0.0), *scale.retrieved])[depths_R]
    table_R2[:, 1] += ranks[rank_R]
    score_TR = calibrated(table_R2, step_TR).masked_fill((traces.retrieved_TR < 0) | ~chosen_R, -torch.inf)
    for depth in range(2, int(depths_R.max()) + 1):
        here_R = (depths_R == depth).nonzero()[:, 0]
        score_TR[:, here_R] += score_TR[:, parents_R[here_R]]
    return score_TR


def echo_scores(traces: Traces, scale: Scale) -> Tensor:
    """log P(accepted) of what each position's text repeats, [T, E]; -inf where nothing matched."""
    nothing = (-torch.inf,) * traces.echo_TE.shape[1]
    return torch.tensor([nothing, *(scale.echo or (nothing,) * LONGEST)])[traces.matched_T]


def _above(values_TN: Tensor, parents_TN: Tensor, root: float = 0.0) -> Tensor:
    """The parents' values."""
    return values_TN.gather(1, parents_TN.clamp(min=0).long()).masked_fill(parents_TN < 0, root)


def _steps(
    step_TN: Tensor, depth_N: Tensor, rank_N: Tensor, above_TN: Tensor, reach_TN: Tensor, kept_T: Tensor
) -> Steps:
    real_TN = (above_TN > LEAST_REACH) & kept_T[:, None] & step_TN.isfinite()
    logit = torch.logit(step_TN[real_TN].exp(), eps=LEAST)
    share = (reach_TN[real_TN] / above_TN[real_TN]).clamp(max=1.0)
    columns = (logit, depth_N.expand_as(step_TN)[real_TN], rank_N.expand_as(step_TN)[real_TN])
    stride = len(logit) // MOST_STEPS + 1
    return Steps(*(column[::stride] for column in (*columns, above_TN[real_TN], share)))


def _fit(steps: Steps, depths: int, ranks: int) -> tuple[tuple[tuple[float, float], ...], tuple[float, ...]]:
    """(slope, offset) by depth, and what each rank adds: Newton's method on a ridge-regularised likelihood."""
    reached = (steps.depth[:, None] >= torch.arange(1, depths + 1)).double()
    by_rank = F.one_hot(steps.rank, ranks).double()
    columns = torch.cat((steps.logit[:, None].double() * reached, reached, by_rank), dim=1)
    prior = torch.zeros(columns.shape[1], dtype=torch.double)
    prior[0] = 1.0  # the source at its word
    found, weight = prior.clone(), steps.reach.double()
    for _ in range(25):
        p = (columns @ found).sigmoid()
        gradient = columns.T @ (weight * (p - steps.share.double())) + RIDGE * (found - prior)
        hessian = (columns.T * (weight * p * (1 - p))) @ columns + RIDGE * torch.eye(len(prior), dtype=torch.double)
        found = found - torch.linalg.solve(hessian, gradient).clamp(-1.0, 1.0)
    slopes = found[:depths].cumsum(0).clamp(min=0.05).tolist()
    offsets = found[depths : 2 * depths].cumsum(0).tolist()
    return tuple(zip(slopes, offsets, strict=True)), tuple(found[2 * depths :].tolist())


def _fit_echo(traces: Traces, kept_T: Tensor) -> tuple[tuple[float, ...], ...]:
    """Mean reach by matched tokens and depth; few matches are drawn to what shorter ones reached."""
    rows, known_E = [], torch.zeros(traces.echo_TE.shape[1])
    for matched in range(1, LONGEST + 1):
        reach_ME = traces.echo_reach_TE[kept_T & (traces.matched_T == matched)]
        known_E = (reach_ME.sum(dim=0) + NO_FAITH * known_E) / (len(reach_ME) + NO_FAITH)
        rows.append(tuple(known_E.clamp(LEAST_REACH, 1.0).log().tolist()))
    return tuple(rows)


def calibration_error(probability: Tensor, reach: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean gap between promised and met acceptance, in bins of equal size."""
    order = probability.argsort()
    gaps = [
        (probability[part].mean() - reach[part].mean()).abs() * len(part) for part in order.chunk(bins) if len(part)
    ]
    return float(sum(gaps)) / len(probability)

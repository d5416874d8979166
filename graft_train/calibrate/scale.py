"""P(accepted) of a candidate from its source's probability of every step, its depth, rank and source."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from graft_inference.policy.plan import Scale
from graft_inference.policy.tree_builder import LEAST, calibrated
from graft_inference.retrieval.prompt_lookup import LONGEST
from graft_train.calibrate.traces import Traces

RIDGES = (0.01, 0.1, 1.0, 10.0, 1e4)
"""Pulls of each depth towards the one above it, of ranks towards each other, of all to the source's word: as of the
steps of so many prompts. The last leaves the source at its word."""
FOLDS = 5
NO_FAITH = 10.0
"""Matches seen fewer times than this are trusted little more than shorter ones."""
MOST_STEPS = 50_000
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
        prompt: which they belong to.
    """

    logit: Tensor
    depth: Tensor
    rank: Tensor
    reach: Tensor
    share: Tensor
    prompt: Tensor


def fit_scale(traces: Traces, prompts: Tensor | None = None) -> Scale:
    """The scale that makes other prompts likeliest: logistic regressions, each depth drawn to the one above it.

    Args:
        prompts: fit on these prompts alone.
    """
    kept_T = torch.ones(len(traces), dtype=torch.bool) if prompts is None else torch.isin(traces.prompt_T, prompts)
    above_TC, reach_TC = _above(traces.logp_TC, traces.parents_TC), _above(traces.reach_TC, traces.parents_TC, 1.0)
    rank_C = torch.zeros_like(traces.depths_C)
    drafted, _ = _fit(
        _steps(traces, traces.logp_TC - above_TC, traces.depths_C, rank_C, reach_TC, traces.reach_TC, kept_T),
        int(traces.depths_C.max()),
        1,
    )
    depths_R, parents_R, rank_R = template_columns(traces)
    parents_TR = parents_R.expand_as(traces.reach_TR)
    above_TR, reach_TR = _above(traces.retrieved_logp_TR, parents_TR), _above(traces.reach_TR, parents_TR, 1.0)
    step_TR = traces.retrieved_logp_TR - above_TR
    reach_TR = reach_TR.masked_fill(traces.retrieved_TR < 0, 0.0)
    retrieved, ranks = _fit(
        _steps(traces, step_TR, depths_R, rank_R, reach_TR, traces.reach_TR, kept_T),
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
    traces: Traces,
    step_TN: Tensor,
    depth_N: Tensor,
    rank_N: Tensor,
    above_TN: Tensor,
    reach_TN: Tensor,
    kept_T: Tensor,
) -> Steps:
    real_TN = (above_TN > LEAST_REACH) & kept_T[:, None] & step_TN.isfinite()
    logit = torch.logit(step_TN[real_TN].exp(), eps=LEAST)
    share = (reach_TN[real_TN] / above_TN[real_TN]).clamp(max=1.0)
    place_N = (depth_N, rank_N, traces.prompt_T[:, None])
    depth, rank, prompt = (column.expand_as(step_TN)[real_TN] for column in place_N)
    # Every so many of them would leave out candidates, wherever their number is a multiple of it.
    chosen = torch.randperm(len(logit), generator=torch.Generator().manual_seed(0))[:MOST_STEPS]
    return Steps(*(column[chosen] for column in (logit, depth, rank, above_TN[real_TN], share, prompt)))


def _fit(steps: Steps, depths: int, ranks: int) -> tuple[tuple[tuple[float, float], ...], tuple[float, ...]]:
    """(slope, offset) by depth, and what each rank adds: logistic regression with the ridge that prompts ask for."""
    reached = (steps.depth[:, None] >= torch.arange(1, depths + 1)).double()
    by_rank = F.one_hot(steps.rank, ranks).double()
    columns_SK = torch.cat((steps.logit[:, None].double() * reached, reached, by_rank), dim=1)
    prior_K = torch.zeros(columns_SK.shape[1], dtype=torch.double)
    prior_K[0] = 1.0  # the source at its word
    prompts, prompt_S = steps.prompt.unique(return_inverse=True)
    weight_S, share_S = steps.reach.double(), steps.share.double()
    found_K = prior_K
    if len(prompts) > 1:  # one says nothing of others
        ridges = [float(weight_S.sum()) / len(prompts) * ridge for ridge in RIDGES]
        ridge = _firmest(columns_SK, weight_S, share_S, prompt_S, prior_K, ridges)
        found_K = _newton(columns_SK, weight_S, share_S, prior_K, ridge)
    slopes = found_K[:depths].cumsum(0).clamp(min=0.05).tolist()
    offsets = found_K[depths : 2 * depths].cumsum(0).tolist()
    return tuple(zip(slopes, offsets, strict=True)), tuple(found_K[2 * depths :].tolist())


def _firmest(
    columns_SK: Tensor, weight_S: Tensor, share_S: Tensor, prompt_S: Tensor, prior_K: Tensor, ridges: list[float]
) -> float:
    """The greatest ridge that foretells prompts left out as well as the best does, to a standard error.

    The steps of one prompt repeat each other: only on other prompts does it show what was no more than theirs.
    """
    prompts = int(prompt_S.max()) + 1
    loss_RP = torch.zeros(len(ridges), prompts, dtype=torch.double)
    for fold in range(min(FOLDS, prompts)):
        left_out_S = prompt_S % FOLDS == fold
        kept_S = weight_S.masked_fill(left_out_S, 0.0)
        for row, ridge in enumerate(ridges):
            logit_S = columns_SK @ _newton(columns_SK, kept_S, share_S, prior_K, ridge)
            loss_S = F.binary_cross_entropy_with_logits(logit_S, share_S, weight_S, reduction="none")
            loss_RP[row].index_add_(0, prompt_S, loss_S * left_out_S)
    worse_RP = loss_RP - loss_RP[loss_RP.sum(dim=1).argmin()]
    as_good_R = worse_RP.mean(dim=1) <= worse_RP.std(dim=1) / prompts**0.5
    return max(ridge for ridge, as_good in zip(ridges, as_good_R.tolist(), strict=True) if as_good)


def _newton(columns_SK: Tensor, weight_S: Tensor, share_S: Tensor, prior_K: Tensor, ridge: float) -> Tensor:
    """What is likeliest under a ridge around the prior, [K]."""
    ridge_KK = ridge * torch.eye(len(prior_K), dtype=torch.double)
    found_K = prior_K
    for _ in range(25):
        p_S = (columns_SK @ found_K).sigmoid()
        gradient_K = columns_SK.T @ (weight_S * (p_S - share_S)) + ridge * (found_K - prior_K)
        hessian_KK = (columns_SK.T * (weight_S * p_S * (1 - p_S))) @ columns_SK + ridge_KK
        step_K = torch.linalg.solve(hessian_KK, gradient_K).clamp(-1.0, 1.0)
        found_K = found_K - step_K
        if step_K.abs().max() < 1e-6:
            break
    return found_K


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

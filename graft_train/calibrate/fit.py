"""Fits the acceptance model: P(accepted) of a candidate from what its proposer says of it, its depth and its rank."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from graft_inference import AcceptanceModel, SourceModel
from graft_inference.policy.acceptance import LEAST, by_evidence, calibrated
from graft_inference.retrieval.sources import SOURCES
from graft_train.calibrate.traces import SourceTraces, Traces

RIDGES = (0.01, 0.1, 1.0, 10.0, 1e4)
"""Pulls of each depth towards the one above it, of ranks towards each other, of all to the source's word: as of the
steps of so many prompts. The last leaves the source at its word."""
FOLDS = 5
NO_FAITH = 10.0
"""Evidence seen fewer times than this is trusted little more than the kind before it."""
MOST_STEPS = 50_000
LEAST_REACH = 1e-3
"""Steps from parents less likely than this do not enter a fit, and P(accepted) by evidence does not fall below it."""


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


def fit_acceptance(traces: Traces, prompts: Tensor | None = None) -> AcceptanceModel:
    """The model that makes other prompts likeliest: logistic regressions, each depth drawn to the one above it.

    Sources that go by evidence have a table of what they reached.

    Args:
        prompts: fit on these prompts alone.
    """
    kept_T = torch.ones(len(traces), dtype=torch.bool) if prompts is None else torch.isin(traces.prompt_T, prompts)
    above_TC, reach_TC = _above(traces.logp_TC, traces.parents_TC), _above(traces.reach_TC, traces.parents_TC, 1.0)
    rank_C = torch.zeros_like(traces.depths_C)
    steps = _steps(traces, traces.logp_TC - above_TC, traces.depths_C, rank_C, reach_TC, traces.reach_TC, kept_T)
    slopes, offsets, _ = _fit(steps, int(traces.depths_C.max()), 1)
    sources = tuple(
        _fit_evidence(name, source, kept_T) if SOURCES[name].kinds else _fit_source(name, traces, kept_T)
        for name, source in traces.sources.items()
    )
    return AcceptanceModel(tuple(zip(slopes, offsets, strict=True)), sources)


def raw_acceptance(traces: Traces) -> AcceptanceModel:
    """Probabilities taken at their word; sources that go by evidence have none, and keep what is fitted."""
    fitted = fit_acceptance(traces)
    return AcceptanceModel(
        ((1.0, 0.0),) * len(fitted.drafted),
        tuple(
            replace(source, slopes=(1.0,) * depths, offsets=((0.0,) * depths,), ranks=(0.0,) * len(source.ranks))
            if (depths := len(source.slopes))
            else source
            for source in fitted.sources
        ),
    )


def template_columns(source: SourceTraces) -> tuple[Tensor, Tensor, Tensor]:
    """Depth, parent's row (-1: the root) and last rank of each rank path, [R]."""
    rows = {path: row for row, path in enumerate(source.template)}
    parents = [rows.get(path[:-1], -1) for path in rows]
    depths_R = (source.template_RL >= 0).sum(dim=1)
    return depths_R, torch.tensor(parents, dtype=torch.long), torch.tensor([path[-1] for path in rows])


def drafted_scores(traces: Traces, model: AcceptanceModel) -> Tensor:
    """log P(accepted) of every drafted candidate, [T, C]."""
    step_TC = traces.logp_TC - _above(traces.logp_TC, traces.parents_TC)
    score_TC = calibrated(torch.tensor([(1.0, 0.0), *model.drafted])[traces.depths_C], step_TC)
    for depth in range(2, int(traces.depths_C.max()) + 1):
        here_C = (traces.depths_C == depth).nonzero()[:, 0]
        score_TC[:, here_C] += score_TC.gather(1, traces.parents_TC[:, here_C].long())
    return score_TC


def source_scores(source: SourceTraces, model: SourceModel | None) -> Tensor:
    """log P(accepted) of every candidate of a source in the model's template, [T, R]; -inf for others."""
    chosen = {path: row for row, path in enumerate(model.template, 1)} if model else {}
    row_R = torch.tensor([chosen.get(path, -1) for path in source.template], dtype=torch.long)
    none_TR = (source.tokens_TR < 0) | (row_R < 0)
    if model is None or not chosen:
        return torch.full_like(source.logp_TR, -torch.inf)
    if not model.slopes:
        return by_evidence(model)[source.evidence_T][:, row_R.clamp(min=0)].masked_fill(none_TR, -torch.inf)
    depths_R, parents_R, rank_R = template_columns(source)
    step_TR = source.logp_TR - _above(source.logp_TR, parents_R.expand_as(source.logp_TR))
    ranks = torch.tensor([*model.ranks, *[0.0] * (int(rank_R.max()) + 1 - len(model.ranks))])
    table_R2 = torch.tensor([(1.0, 0.0), *zip(model.slopes, model.offsets[0], strict=True)])[depths_R]
    table_R2[:, 1] += ranks[rank_R]
    score_TR = calibrated(table_R2, step_TR).masked_fill(none_TR, -torch.inf)
    for depth in range(2, int(depths_R.max()) + 1):
        here_R = (depths_R == depth).nonzero()[:, 0]
        score_TR[:, here_R] += score_TR[:, parents_R[here_R]]
    return score_TR


def _fit_source(name: str, traces: Traces, kept_T: Tensor) -> SourceModel:
    """Of a source with probabilities."""
    source = traces.sources[name]
    depths_R, parents_R, rank_R = template_columns(source)
    parents_TR = parents_R.expand_as(source.reach_TR)
    above_TR, reach_TR = _above(source.logp_TR, parents_TR), _above(source.reach_TR, parents_TR, 1.0)
    reach_TR = reach_TR.masked_fill(source.tokens_TR < 0, 0.0)
    steps = _steps(traces, source.logp_TR - above_TR, depths_R, rank_R, reach_TR, source.reach_TR, kept_T)
    slopes, offsets, ranks = _fit(steps, source.template_RL.shape[1], int(rank_R.max()) + 1)
    return SourceModel(name, source.template, slopes, (offsets,), ranks)


def _fit_evidence(name: str, source: SourceTraces, kept_T: Tensor) -> SourceModel:
    """Of a source that goes by evidence: mean reach by kind and depth; few of a kind are drawn to the kind before."""
    depths_R, _, rank_R = template_columns(source)
    depths = source.template_RL.shape[1]
    by_depth_RD = F.one_hot(depths_R - 1, depths).float()
    by_depth_RD /= by_depth_RD.sum(dim=0).clamp(min=1)
    offsets, known_D = [], torch.zeros(depths)
    for kind in range(1, SOURCES[name].kinds + 1):
        reach_MD = source.reach_TR[kept_T & (source.evidence_T == kind)] @ by_depth_RD
        known_D = (reach_MD.sum(dim=0) + NO_FAITH * known_D) / (len(reach_MD) + NO_FAITH)
        reach_D = F.pad(known_D.clamp(LEAST_REACH, 1.0), (1, 0), value=1.0)
        offsets.append(tuple(torch.logit((reach_D[1:] / reach_D[:-1]).clamp(max=1.0), eps=LEAST).tolist()))
    return SourceModel(name, source.template, (), tuple(offsets), (0.0,) * (int(rank_R.max()) + 1))


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


def _fit(steps: Steps, depths: int, ranks: int) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Slope and offset by depth, and what each rank adds: logistic regression with the ridge that prompts ask for."""
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
        ridge = _ridge(columns_SK, weight_S, share_S, prompt_S, prior_K, ridges)
        found_K = _newton(columns_SK, weight_S, share_S, prior_K, ridge)
    slopes = found_K[:depths].cumsum(0).clamp(min=0.05).tolist()
    offsets = found_K[depths : 2 * depths].cumsum(0).tolist()
    return tuple(slopes), tuple(offsets), tuple(found_K[2 * depths :].tolist())


def _ridge(
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


def calibration_curve(probability: Tensor, reach: Tensor, bins: int = 15) -> list[tuple[float, float, int]]:
    """Promised and met acceptance and the number of nodes, in bins of equal size, by rising promise."""
    parts = [part for part in probability.argsort().chunk(bins) if len(part)]
    return [(float(probability[part].mean()), float(reach[part].mean()), len(part)) for part in parts]


def calibration_error(probability: Tensor, reach: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean gap between promised and met acceptance, in bins of equal size."""
    curve = calibration_curve(probability, reach, bins)
    return sum(abs(promised - met) * count for promised, met, count in curve) / len(probability)

"""P(accepted) of a candidate from its cumulative log-probability, depth and source."""

from dataclasses import dataclass

import torch
from torch import Tensor

from graft_inference.policy import Scale
from graft_train.calibrate.traces import Traces

RAW = ((1.0, 0.0),)
BINS = 400
GRID = 33
MOST_SLOPE, LEAST_OFFSET = 6.0, -6.0
LEAST_WORTH = 1e-4
"""Nodes of a lower probability do not enter a fit: none of them is ever verified."""


@dataclass
class Nodes:
    """Candidates of one source: log-probability, depth, P(accepted) under the target, and whose prompt."""

    logp: Tensor
    depth: Tensor
    reach: Tensor
    prompt: Tensor


def drafted_nodes(traces: Traces) -> Nodes:
    return _nodes(traces, traces.logp_TC, traces.depths_C, traces.reach_TC)


def retrieved_nodes(traces: Traces) -> Nodes:
    depths_R = (traces.template_RL >= 0).sum(dim=1)
    return _nodes(traces, traces.retrieved_logp_TR, depths_R, traces.reach_TR)


def _nodes(traces: Traces, logp_TN: Tensor, depths_N: Tensor, reach_TN: Tensor) -> Nodes:
    worth_TN = logp_TN.exp() > LEAST_WORTH
    depth_TN = depths_N.expand_as(logp_TN)
    prompt_TN = traces.prompt_T[:, None].expand_as(logp_TN)
    return Nodes(logp_TN[worth_TN], depth_TN[worth_TN], reach_TN[worth_TN], prompt_TN[worth_TN])


def fit_scale(traces: Traces, prompts: Tensor | None = None) -> Scale:
    """The scale that makes the traces likeliest, fitted from the root down.

    Args:
        prompts: fit on these prompts alone.
    """

    def fitted(nodes: Nodes, depth: int) -> tuple[tuple[float, float], ...]:
        kept = torch.ones_like(nodes.prompt, dtype=torch.bool) if prompts is None else torch.isin(nodes.prompt, prompts)
        return _fit(Nodes(nodes.logp[kept], nodes.depth[kept], nodes.reach[kept], nodes.prompt[kept]), depth)

    drafted = fitted(drafted_nodes(traces), int(traces.depths_C.max()))
    retrieved = fitted(retrieved_nodes(traces), traces.template_RL.shape[1])
    return Scale(drafted, retrieved, traces.template)


def raw_scale(traces: Traces) -> Scale:
    """Each source's own probabilities, taken at their word."""
    return Scale(RAW * int(traces.depths_C.max()), RAW * traces.template_RL.shape[1], traces.template)


def _fit(nodes: Nodes, max_depth: int) -> tuple[tuple[float, float], ...]:
    """(slope, offset) by depth; a depth starts from the one above it, and with it ends where there is no data."""
    table: list[tuple[float, float]] = []
    slope, offset = 0.05, 0.0
    for depth in range(1, max_depth + 1):
        here = nodes.depth == depth
        if int(here.sum()) >= 50:
            slope, offset = _fit_depth(nodes.logp[here], nodes.reach[here], slope, offset)
        elif depth == 1:
            slope = 1.0
        table.append((slope, offset))
    return tuple(table)


def _fit_depth(logp: Tensor, reach: Tensor, least_slope: float, most_offset: float) -> tuple[float, float]:
    """Maximum likelihood of P = exp(slope * logp + offset), slope and offset bounded by the depth above.

    A grid, made finer around its best point three times: the likelihood is flat where nothing is accepted.
    """
    order = logp.argsort()
    bins = torch.arange(len(logp)) * BINS // len(logp)
    counts_b = bins.bincount(minlength=BINS).double()
    filled = counts_b > 0
    x_b = torch.zeros(BINS, dtype=torch.double).index_add_(0, bins, logp[order].double())[filled] / counts_b[filled]
    y_b = torch.zeros(BINS, dtype=torch.double).index_add_(0, bins, reach[order].double())[filled]
    counts_b = counts_b[filled]
    slopes = (least_slope, max(MOST_SLOPE, least_slope))
    offsets = (min(LEAST_OFFSET, most_offset), most_offset)
    for _ in range(4):
        slope_i = torch.linspace(*slopes, GRID, dtype=torch.double)
        offset_j = torch.linspace(*offsets, GRID, dtype=torch.double)
        log_p = (slope_i[:, None, None] * x_b + offset_j[:, None]).clamp(max=-1e-6)
        fit_ij = (y_b * log_p + (counts_b - y_b) * torch.log(-torch.expm1(log_p))).sum(dim=2)
        i, j = divmod(int(fit_ij.argmax()), GRID)
        slopes = float(slope_i[max(i - 1, 0)]), float(slope_i[min(i + 1, GRID - 1)])
        offsets = float(offset_j[max(j - 1, 0)]), float(offset_j[min(j + 1, GRID - 1)])
    return float(slope_i[i]), float(offset_j[j])


def calibration_error(probability: Tensor, reach: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean gap between promised and met acceptance, in bins of equal size."""
    order = probability.argsort()
    gaps = [
        (probability[part].mean() - reach[part].mean()).abs() * len(part) for part in order.chunk(bins) if len(part)
    ]
    return float(sum(gaps)) / len(probability)

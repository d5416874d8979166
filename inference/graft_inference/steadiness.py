"""Whether a machine was steady enough for its figures to be trusted."""

from collections.abc import Iterable, Sequence
from statistics import median

import torch

UNSTEADY = 0.1
"""Variation of the same work's time within a run from which on its figures are not to be trusted."""


def variation(times: Iterable[Sequence[float]]) -> float:
    """Interquartile range over median: how much the time of the same work varied; 0 where nothing was timed.

    Args:
        times: of every piece of work, each time that it took.
    """
    relative = [one / median(found) for found in times for one in found if median(found)]
    return quantile(relative, 0.75) - quantile(relative, 0.25) if relative else 0.0


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies, by linear interpolation."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()

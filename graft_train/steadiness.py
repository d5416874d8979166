"""Whether a machine was steady enough for its figures to be trusted."""

from collections.abc import Iterable, Sequence

import numpy as np

UNSTEADY = 0.1
"""Variation of the same work's time within a run from which on its figures are not to be trusted."""


def variation(times: Iterable[Sequence[float]]) -> float:
    """Interquartile range over median: how much the time of the same work varied; 0 where nothing was timed.

    Args:
        times: of every piece of work, each time that it took.
    """
    relative = [float(one / np.median(found)) for found in times for one in found if np.median(found)]
    low, high = np.percentile(relative or [1.0], [25, 75])
    return float(high - low)


def distrust(found: float, what: str, remedy: str) -> str | None:
    """What a report says beside its figures where the machine was unsteady.

    Args:
        found: the variation.
        what: of which work.
        remedy: what to do about it, beside an idle machine.
    """
    if found <= UNSTEADY:
        return None
    return (
        f"These figures cannot be trusted: within the run the time of {what} varied by {found:.0%} (interquartile "
        f"range over median). Measure again on an idle machine, or {remedy}."
    )

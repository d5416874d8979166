"""What a round costs on this device, by phase, against draft steps, verified nodes and context."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from graft_inference import GraftError, Plan
from graft_inference.checked import is_a
from graft_inference.files import read_json
from graft_inference.retrieval.sources import SOURCES
from graft_train.config.policy import CalibrateConfig


@dataclass
class Latency:
    """Milliseconds per round, the lower quartile of rounds, and the spread they were seen with.

    Attributes:
        num_draft_tokens: nodes of a verification that were timed: of those asked for, what a tree can have.
        contexts: tokens in the cache at which they were timed.
        verify_ms: one target pass, [contexts][num_draft_tokens].
        draft_ms: the head at 0, 1, 2, ... steps.
        build_ms: choosing the tree, without retrieved candidates.
        commit_ms: acceptance and keeping its result, without sources.
        source_ms: what each source adds, by name: it proposes, observes and is scored.
        read_ms: foreseeing what was retrieved, and one more host read, to leave out drafting.
        spread: interquartile range over median of each timed plan's rounds: the median of them, and the most.
    """

    num_draft_tokens: list[int]
    contexts: list[int]
    verify_ms: list[list[float]]
    draft_ms: list[float]
    build_ms: float
    commit_ms: float
    source_ms: dict[str, float]
    read_ms: float
    spread: list[float]

    def round_ms(self, plan: Plan, checkpoint: Any, context_T: np.ndarray) -> np.ndarray:
        """Cost of rounds that stop at this checkpoint, [T]."""
        phases = self.phases_ms(plan, checkpoint, context_T)
        return phases["draft"] + phases["graft"] + phases["commit"] + phases["verify"]

    def phases_ms(self, plan: Plan, checkpoint: Any, context_T: np.ndarray) -> dict[str, Any]:
        """The same by phase, `verify` [T] and the others one number each. The sources' work counts for `graft`."""
        asks_first = len(plan.checkpoints) > 1 and not plan.checkpoints[0].steps
        by_context = [np.interp(checkpoint.num_draft_tokens, self.num_draft_tokens, times) for times in self.verify_ms]
        return {
            "draft": self.draft_ms[checkpoint.steps] + asks_first * self.read_ms,
            "graft": self.build_ms + sum(self.source_ms[name] for name in plan.sources),
            "verify": np.interp(context_T, self.contexts, by_context),
            "commit": self.commit_ms,
        }

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def elsewhere(path: Path, own: Path, settings: CalibrateConfig) -> tuple[Latency, dict[str, Any]]:
    """The latency table of another engine, and what it was measured on.

    Args:
        path: `num_draft_tokens`, `contexts`, `verify_ms`, `draft_ms` and `measured_on`, all as in `Latency`.
        own: of the engine that traced. What choosing and looking up take on the host is read there: the code is the
            same.

    Raises:
        GraftError: other values in the files, or fewer draft steps or nodes than plans may have.
    """
    values = read_json(path, "measure it again")
    try:
        here = read_latency(own, "run graft calibrate without latency_from")
        measured_on = {name: str(value) for name, value in values.pop("measured_on").items()}
        _check_table(**values)
        latency = replace(here, **values, commit_ms=0.0)
    except GraftError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise GraftError(f"{path} is no table of latencies ({error}): measure it again") from error
    nodes, most = max(latency.num_draft_tokens), max(settings.num_draft_tokens)
    if nodes < most or len(latency.draft_ms) <= settings.num_steps:
        raise GraftError(
            f"{path} has times of {nodes - 1} verified tokens and {len(latency.draft_ms) - 1} draft "
            f"steps, but policy.num_draft_tokens has up to {most - 1} and policy.num_steps is "
            f"{settings.num_steps}: measure more, or lower these"
        )
    return latency, measured_on


def read_latency(path: Path, remedy: str) -> Latency:
    """A table as calibration wrote it.

    Raises:
        GraftError: it is missing or damaged, with the remedy.
        TypeError: it has other fields, as of another version.
    """
    latency = Latency(**read_json(path, remedy))
    try:
        _check_table(latency.num_draft_tokens, latency.contexts, latency.verify_ms, latency.draft_ms)
        _check_own(latency)
    except (TypeError, AttributeError, ValueError) as error:
        raise GraftError(f"{path} is no table of latencies ({error}): {remedy}") from error
    return latency


def _check_own(latency: Latency) -> None:
    """Raises ValueError unless what was measured beside a table is times, of the sources that there are."""
    if latency.source_ms.keys() != SOURCES.keys():
        raise ValueError(f"source_ms must have {', '.join(SOURCES)}")
    for time in (latency.build_ms, latency.read_ms, latency.commit_ms, *latency.source_ms.values()):
        if not is_a(time, float) or time < 0:
            raise ValueError("times must be numbers from 0")


def _check_table(
    num_draft_tokens: list[int], contexts: list[int], verify_ms: list[list[float]], draft_ms: list[float]
) -> None:
    """Raises ValueError or TypeError unless each count of nodes and each context has a time, and more is no faster."""
    for name, counts in {"num_draft_tokens": num_draft_tokens, "contexts": contexts}.items():
        known = all(type(count) is int and 0 <= count < 2**31 for count in counts)
        if not counts or not known or counts != sorted({*counts}):
            raise ValueError(f"{name} must be whole numbers that rise")
    if num_draft_tokens[0] != 1 or draft_ms[:1] != [0.0]:
        raise ValueError("num_draft_tokens begin with 1, the root, and draft_ms with 0, for no step")
    if [len(times) for times in verify_ms] != [len(num_draft_tokens)] * len(contexts):
        raise ValueError("verify_ms must have a time of every number of nodes for every context")
    for times in [*verify_ms, draft_ms]:
        if not all(is_a(time, float) for time in times) or times != sorted(times):
            raise ValueError("times must be numbers that do not fall")
    if min(times[0] for times in verify_ms) <= 0:
        raise ValueError("a pass takes time")

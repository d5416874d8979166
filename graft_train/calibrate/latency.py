"""What a round costs on this device, by phase, against head passes and verified rows."""

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
from torch import Tensor

from graft_inference import GraftEngine, Plan, Stage
from graft_inference.policy import depth_template


@dataclass
class Latency:
    """Median milliseconds per round, and the spread they were seen with.

    Attributes:
        widths: rows of a verification that were timed.
        verify_ms: one target pass, and keeping its result, at each of these widths.
        draft_ms: the head at 0, 1, 2, ... passes.
        graft_ms: look-up and merging, with and without (index 1 and 0) retrieved rows.
        spread: greatest interquartile range over median of any of them.
    """

    widths: list[int]
    verify_ms: list[float]
    draft_ms: list[float]
    graft_ms: list[float]
    spread: float

    def round_ms(self, stage: Stage) -> float:
        """Cost of a round that stops at this stage."""
        verify = float(np.interp(stage.rows, self.widths, self.verify_ms))
        return self.draft_ms[stage.passes] + self.graft_ms[min(stage.retrieved, 1)] + verify

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_latency(
    engine: GraftEngine,
    prompts: list[Tensor],
    widths: list[int],
    beam_width: int,
    max_passes: int,
    repeats: int,
) -> Latency:
    """Times forced plans on real prompts, interleaved, after a warm-up of each."""
    budget = max(*widths, beam_width + 1)
    template = depth_template((max(1, min(8, budget // 3)),) * 9)
    plans = {("width", 1): Plan((Stage(0),), beam_width, budget)}
    for width in widths:
        if width > 1:
            stage = Stage(0, retrieved=min(width - 1, len(template)), template=template)
            plans["width", width] = Plan((stage,), beam_width, budget)
    for passes in range(1, max_passes + 1):
        plans["passes", passes] = Plan((Stage(passes, drafted=1),), beam_width, budget)
    samples: dict[tuple[str, int], list[dict[str, float]]] = {key: [] for key in plans}
    for repeat in range(repeats + 1):
        for key, plan in plans.items():
            stats = engine.generate(prompts[repeat % len(prompts)], 24, plan=plan).stats
            if repeat:  # the first is a warm-up
                samples[key].append({name: 1e3 * s / max(stats.rounds, 1) for name, s in stats.seconds.items()})

    def typical(key: tuple[str, int], *phases: str) -> float:
        return median(sum(sample[phase] for phase in phases) for sample in samples[key])

    def relative_spread(key: tuple[str, int]) -> float:
        totals = [sum(sample.values()) - sample["prefill"] for sample in samples[key]]
        low, middle, high = np.percentile(totals, [25, 50, 75])
        return float((high - low) / middle)

    timed = sorted({1, *widths})
    verify = [typical(("width", width), "verify", "commit") for width in timed]
    grafted = ("width", timed[-1])
    return Latency(
        widths=timed,
        # A wider pass never costs less; what says otherwise is noise.
        verify_ms=np.maximum.accumulate(verify).tolist(),
        draft_ms=[0.0, *(typical(("passes", p), "draft") for p in range(1, max_passes + 1))],
        graft_ms=[typical(("passes", 1), "graft"), typical(grafted, "graft")],
        spread=max(map(relative_spread, samples)),
    )

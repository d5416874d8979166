"""What is measured of a pair on a device before plans are chosen: traces and the latency table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from graft_inference import GraftEngine
from graft_train.calibrate.budget import TABLE, TRACES, Budget
from graft_train.calibrate.timer import RoundTimer
from graft_train.calibrate.trace_file import read_traces
from graft_train.calibrate.traces import Traces, record_traces
from graft_train.config.policy import CalibrateConfig
from graft_train.processes import barrier, is_main, say

TRACE_FILES = {False: "traces.safetensors", True: "traces-shared-noise.safetensors"}
"""By whether head and sources were told the noise of the draws."""


def record_missing(
    settings: CalibrateConfig, engine: GraftEngine, prompts: list[Tensor], out: Path, made_of: dict[str, Any]
) -> None:
    """Writes the files of traces that no interrupted run has left: of as many prompts as the minutes allow.

    All files are of the same prompts.
    """
    files = trace_files(settings)
    found = {shares_noise: out / name for shares_noise, name in files.items() if (out / name).exists()}
    if len(found) == len(files):
        return
    if found:
        positions = len(read_traces(next(iter(found.values())), made_of))
    else:
        positions = affordable(settings, engine, prompts)
    for shares_noise, name in files.items():
        if shares_noise not in found:
            traced = record_traces(engine, prompts, settings, shares_noise, positions)
            if is_main():
                traced.save(out / name, made_of)
            barrier()


def affordable(settings: CalibrateConfig, engine: GraftEngine, prompts: list[Tensor]) -> int:
    """Positions that can be traced in their share of the minutes, but never fewer than are needed.

    Told by the first prompt, which is traced for nothing else.
    """
    budget = Budget(60 * TRACES * settings.minutes)
    tried = len(record_traces(engine, prompts, settings, positions=1))
    seconds = budget.spent * len(trace_files(settings)) / tried
    positions = max(settings.least_rounds, int(budget.left / seconds))
    most = len(prompts) * (settings.max_new_tokens - 1)
    say(f"calibrate: tracing takes about {min(most, positions) * seconds / 60:.1f} minutes")
    if positions < most:
        say(
            f"calibrate: policy.minutes={settings.minutes:g} leaves time to trace about {positions} of up to {most} "
            "positions; raise it to trace all prompts"
        )
    return positions


def trace_files(settings: CalibrateConfig) -> dict[bool, str]:
    """Traces by whether the noise of draws is told; at temperature 0 there is none."""
    return {told: name for told, name in TRACE_FILES.items() if settings.temperature or not told}


def load_traces(settings: CalibrateConfig, directory: Path, made_of: dict[str, Any]) -> dict[bool, Traces]:
    return {
        shares_noise: read_traces(directory / name, made_of) for shares_noise, name in trace_files(settings).items()
    }


def told_traces(traces: Mapping[bool, Traces]) -> Traces:
    """Those of learned plans, which share the noise; at temperature 0, where there is none, the only ones."""
    return traces.get(True, traces[False])


def timer_of(
    settings: CalibrateConfig, engine: GraftEngine, prompts: list[Tensor], traces: Mapping[bool, Traces]
) -> RoundTimer:
    """Has timed this device, with the templates that plans would look up, in the table's share of the minutes."""
    told, most = told_traces(traces), 2 * max(settings.num_draft_tokens)
    templates = {name: source.template[:most] for name, source in told.sources.items()}
    budget = Budget(60 * TABLE * settings.minutes)
    timer = RoundTimer(
        engine,
        prompts,
        settings.num_draft_tokens,
        settings.topk,
        settings.num_steps,
        settings.temperature,
        templates,
        int(told.context_T.max()) + 1,
    )
    say(f"calibrate: timing {len(timer.samples)} plans")
    timer.measure(budget)
    return timer

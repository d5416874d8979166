"""What calibration found, as people read it."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from graft_inference import Plan, QuotaCheckpoint, ScoredPlan
from graft_inference.files import replace_file
from graft_train.calibrate.fit import (
    calibration_curve,
    calibration_error,
    drafted_scores,
    fit_acceptance,
    source_scores,
)
from graft_train.calibrate.replay import Replays, replay_of
from graft_train.calibrate.traces import Traces
from graft_train.config.policy import CalibrateConfig
from graft_train.processes import say
from graft_train.steadiness import distrust

PlanOf = Callable[[str, CalibrateConfig, Replays], Plan]
POINTS = 4
"""Widths at which the frontier is drawn."""
WORTH = 0.02
"""Calibration is judged on nodes that claim at least this; the many hopeless ones would flatter it."""
CONTRADICTS = (
    "the latency table contradicts itself: more work was timed as faster, however often it was measured. Something "
    "else runs on this machine; calibrate again when it is idle"
)
COLORS = {
    "eagle3": "#64748b",
    "draft_only": "#0f766e",
    "retrieve_only": "#7c3aed",
    "paper": "#ca8a04",
    "learned": "#c2410c",
    "chain": "#c2410c",
}


def calibration(traces: Traces) -> dict[str, dict[str, Any]]:
    """Expected calibration error by proposer, raw and fitted, and the curves behind it; fitted on every other prompt,
    judged on the rest.

    The word of a source that goes by evidence is that all it proposes is accepted.
    """
    prompts = traces.prompt_T.unique()
    fitted, judged = prompts[::2], prompts[1::2]
    if not len(judged):
        return {}
    model = fit_acceptance(traces, fitted)
    drafted = _errors(traces, judged, traces.logp_TC, drafted_scores(traces, model), traces.reach_TC)
    found = {"drafted": drafted}
    for one in model.sources:
        source = traces.sources[one.name]
        claimed_TR = source.logp_TR.masked_fill(source.tokens_TR < 0, -torch.inf)
        found[one.name] = _errors(traces, judged, claimed_TR, source_scores(source, one), source.reach_TR)
    return found


def _errors(
    traces: Traces, prompts: torch.Tensor, raw_TN: torch.Tensor, fitted_TN: torch.Tensor, reach_TN: torch.Tensor
) -> dict[str, Any]:
    kept_T1 = torch.isin(traces.prompt_T, prompts)[:, None]
    errors: dict[str, Any] = {"curves": {}}
    for name, logp_TN in (("before", raw_TN), ("after", fitted_TN)):
        kept_TN = kept_T1 & (logp_TN.exp() > WORTH)
        if not kept_TN.any():
            return {}
        claimed, reached = logp_TN[kept_TN].exp(), reach_TN[kept_TN]
        errors |= {name: calibration_error(claimed, reached), "nodes": int(kept_TN.sum())}
        errors["curves"][name] = calibration_curve(claimed, reached)
    return errors


def frontier(
    settings: CalibrateConfig, replays: Replays, names: Iterable[str], plan_of: PlanOf
) -> dict[str, list[dict[str, float]]]:
    """Predicted speed and acceptance length of the best plan of each kind with some of the tree sizes as its most."""
    points: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    num_draft_tokens = sorted({nodes for nodes in settings.num_draft_tokens if nodes > 1})
    for nodes in num_draft_tokens[:: -max(1, len(num_draft_tokens) // POINTS)][::-1]:
        narrow = replace(settings, num_draft_tokens=[one for one in settings.num_draft_tokens if one <= nodes])
        for name in points:
            plan = plan_of(name, narrow, replays)
            speed, acceptance_length = replay_of(replays, plan).run(plan)
            points[name].append(
                {"num_draft_tokens": nodes, "tokens_per_second": speed, "acceptance_length": acceptance_length}
            )
    return points


def describe(plan: Plan) -> str:
    """Steps, thresholds and nodes of each checkpoint, and which sources are asked, in one line."""
    asked = ", ".join(plan.sources)
    if isinstance(plan, ScoredPlan) and "matrix" in plan.sources and not plan.learns_accepted:
        asked += ", taught by all nodes"
    parts = []
    for one in plan.checkpoints:
        last = one is plan.checkpoints[-1]
        rule = "" if last else f" if <= {one.threshold:.2f}" if one.steps else f" if > {one.threshold:.2f}"
        nodes = f"1+{one.drafted}+{one.retrieved}" if isinstance(one, QuotaCheckpoint) else one.num_draft_tokens
        parts.append(f"{one.steps}{rule}: {nodes}")
    return "; ".join(parts) + (f" ({asked})" if asked else "")


def rows_of(report: dict[str, Any], plans: dict[str, Plan]) -> list[tuple[str, ...]]:
    """A row of HEADER for each plan."""
    rows: list[tuple[str, ...]] = []
    for name, plan in plans.items():
        predicted, measured = report["predicted"][name], report["measured"][name]
        # A matrix taught by all nodes is raced, not predicted: the error is of the form that was replayed.
        error = predicted["tokens_per_second"] / report["measured_as_predicted"][name] - 1
        over = measured["over_fastest"]
        rows.append(
            (
                name,
                describe(plan),
                f"{predicted['tokens_per_second']:.0f}",
                f"{measured['tokens_per_second']:.0f}",
                f"{error:+.1%}",
                f"{predicted['acceptance_length']:.2f}/{measured['acceptance_length']:.2f}",
                f"{measured['laps']}" + ("" if measured["left"] else ", out"),
                f"{over[0]:.2f}x ({over[1]:.2f}-{over[2]:.2f})",
            )
        )
    return rows


HEADER = (
    "plan",
    "steps: nodes",
    "predicted",
    "measured",
    "error",
    "acceptance",
    "laps",
    "of the fastest (95 %)",
)


def notes(report: dict[str, Any]) -> list[str]:
    """How far the figures can be trusted, one sentence or two each."""
    race = report["race"]
    left = [name for name in race["left"] if name != race["fastest"]]
    found = [f"The race took {race['laps']} laps; {race['fastest']} was the fastest."]
    if left:
        found.append(f"Its minutes ended before these could be told from it: {'; '.join(left)}.")
    if unsteady := distrust(race["variation"], "the same rounds", "raise policy.minutes for more laps"):
        found.append(unsteady)
    if report["latency_contradicts"]:
        found.append(f"{CONTRADICTS[0].upper()}{CONTRADICTS[1:]}.")
    return found


def print_report(report: dict[str, Any], plans: dict[str, Plan]) -> None:
    """Checkpoints and laps do not fit beside a plan's figures in a terminal: the former come below."""
    table = Table(title="plans on the calibration prompts, tokens/s", box=SIMPLE_HEAD, pad_edge=False)
    shown = [index for index, column in enumerate(HEADER) if column not in ("steps: nodes", "laps")]
    for index in shown:
        table.add_column(HEADER[index], justify="right" if index else "left", no_wrap=True)
    for row in rows_of(report, plans):
        table.add_row(*(row[index] for index in shown), style="bold" if row[0] == report["graft_is"] else None)
    Console().print(table)
    for name, plan in plans.items():
        print(f"  {name}: {describe(plan)}")
    for note in notes(report):
        print(note)
    print(f"graft is {report['graft_is']}")


def to_markdown(report: dict[str, Any], plans: dict[str, Plan]) -> str:
    device, latency = report["device"], report["latency_ms"]
    lines = [
        "# Calibration",
        "",
        f"{device['name']}, {device['threads']} threads; {report['prompts']} prompts, {report['positions']} positions. "
        f"`graft` is the plan `{report['graft_is']}`.",
        "",
        f"| {' | '.join(HEADER)} |",
        "|" + "---|" * len(HEADER),
        *(f"| {' | '.join(row)} |" for row in rows_of(report, plans)),
        "",
        "Speeds are over all prompts: predicted by replay and the latency table, measured by the replay corrected by "
        "the laps of the race. A plan drops out when it cannot win any more; its ratio to the fastest is of the laps "
        "that both ran. Acceptance is of the prompts of those laps, predicted/measured. In the race the device took "
        f"{report['race']['slowness']:.2f} times as long as for the table, which the predictions include.",
        "",
        *notes(report),
        "",
        "## Calibration error",
        "",
        f"Of nodes that claim at least {WORTH:.0%}, on prompts that the fit did not see.",
        "",
        "| source | before | after | nodes |",
        "|---|---:|---:|---:|",
        *(
            f"| {source} | {error['before']:.2%} | {error['after']:.2%} | {error['nodes']} |"
            for source, error in report["calibration_error"].items()
            if error
        ),
        "",
        "## Latency, ms",
        "",
        f"| context | {' | '.join(f'{nodes} nodes' for nodes in latency['num_draft_tokens'])} |",
        "|---|" + "---:|" * len(latency["num_draft_tokens"]),
        *(
            f"| {context} | {' | '.join(f'{time:.2f}' for time in times)} |"
            for context, times in zip(latency["contexts"], latency["verify_ms"], strict=True)
        ),
        "",
        f"Draft steps 0, 1, ...: {_times(latency['draft_ms'])}. Choosing the tree takes {latency['build_ms']:.2f}, "
        f"acceptance and commit {latency['commit_ms']:.2f}; {_sources(latency['source_ms'])}; one more host read "
        f"{latency['read_ms']:.2f}. "
        f"Interquartile range over median of a round: {latency['spread'][0]:.0%} typically, "
        f"{latency['spread'][1]:.0%} at most.",
        "",
        "![speed against acceptance length](frontier.png)",
        "",
    ]
    return "\n".join(lines)


def _sources(milliseconds: dict[str, float]) -> str:
    return ", ".join(f"the source {name} {time:.2f} more" for name, time in milliseconds.items())


def _times(milliseconds: list[float]) -> str:
    return ", ".join(f"{time:.2f}" for time in milliseconds)


def draw_frontier(report: dict[str, Any], path: Path) -> None:
    """Speed against acceptance length: predicted along the tree sizes, measured as stars."""
    try:
        import matplotlib
    except ImportError:
        say(f"no {path.name}: matplotlib is not installed")
        return

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for name, points in report["frontier"].items():
        color = COLORS[name]
        axes.plot(
            [point["acceptance_length"] for point in points],
            [point["tokens_per_second"] for point in points],
            color=color,
            marker="o",
            markersize=3,
            linewidth=1.2,
            alpha=0.8,
        )
        measured = report["measured"][name]
        axes.scatter(
            measured["acceptance_length"],
            measured["tokens_per_second"],
            color=color,
            marker="*",
            s=130,
            zorder=3,
            label=name,
        )
    axes.set(xlabel="acceptance length", ylabel="tokens/s")
    axes.set_title("lines: predicted, by widest verification allowed; stars: measured", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    replace_file(path, lambda aside: figure.savefig(aside, dpi=150, format="png"))
    plt.close(figure)

"""What calibration found, as people read it."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from graft_inference import Plan
from graft_inference.files import replace_file
from graft_train.calibrate.replay import Replays, replay_of
from graft_train.calibrate.scale import calibration_error, drafted_scores, echo_scores, fit_scale, retrieved_scores
from graft_train.calibrate.traces import Traces
from graft_train.config.policy import CalibrateConfig
from graft_train.processes import say

PlanOf = Callable[[str, CalibrateConfig, Replays], Plan]
POINTS = 4
"""Widths at which the frontier is drawn."""
WORTH = 0.02
"""Calibration is judged on nodes that claim at least this; the many hopeless ones would flatter it."""
PIECES: dict[str, dict[str, Any]] = {
    "all": {},
    "no calibration": {"calibrated": False},
    "no learned template": {"learned_template": False},
    "no early stop": {"checkpoints": 0},
    "always drafts": {"retrieve_first": False},
    "no echo": {"echo": False},
    "no longer contexts": {"ngrams": False},
    "no shared noise": {"shared_noise": False},
}
UNSTEADY = 0.1
"""Variation of the same work's time within a race from which on its figures are not to be trusted."""
CONTRADICTS = (
    "the latency table contradicts itself: more work was timed as faster, twice. Something else runs on this machine; "
    "calibrate again when it is idle"
)
COLORS = {
    "eagle3": "#64748b",
    "prune_only": "#0f766e",
    "retrieve_only": "#7c3aed",
    "paper": "#ca8a04",
    "learned": "#c2410c",
    "retrieve_ngrams": "#db2777",
    "learned_ngrams": "#0284c7",
}


def calibration(traces: Traces) -> dict[str, dict[str, float]]:
    """Expected calibration error by source, raw and fitted; fitted on every other prompt, judged on the rest.

    An echo's word is that everything goes on as it did.
    """
    prompts = traces.prompt_T.unique()
    fitted, judged = prompts[::2], prompts[1::2]
    if not len(judged):
        return {}
    found = {}
    for part, name in ((traces, "retrieved"), (traces.of_ngrams(), "longer contexts")):
        if part.retrieved_TR.shape[1]:
            scores = retrieved_scores(part, fit_scale(part, fitted))
            found[name] = _errors(part, judged, part.retrieved_logp_TR, scores, part.reach_TR)
    scale = fit_scale(traces, fitted)
    found["drafted"] = _errors(traces, judged, traces.logp_TC, drafted_scores(traces, scale), traces.reach_TC)
    claimed_TE = torch.where(traces.matched_T[:, None] > 0, torch.zeros_like(traces.echo_reach_TE), -torch.inf)
    found["echo"] = _errors(traces, judged, claimed_TE, echo_scores(traces, scale), traces.echo_reach_TE)
    return found


def _errors(
    traces: Traces, prompts: torch.Tensor, raw_TN: torch.Tensor, fitted_TN: torch.Tensor, reach_TN: torch.Tensor
) -> dict[str, float]:
    kept_T1 = torch.isin(traces.prompt_T, prompts)[:, None]
    errors: dict[str, float] = {}
    for name, logp_TN in (("before", raw_TN), ("after", fitted_TN)):
        kept_TN = kept_T1 & (logp_TN.exp() > WORTH)
        if not kept_TN.any():
            return {}
        errors |= {name: calibration_error(logp_TN[kept_TN].exp(), reach_TN[kept_TN]), "nodes": int(kept_TN.sum())}
    return errors


def pieces(settings: CalibrateConfig) -> dict[str, dict[str, Any]]:
    """What may be taken away of what is there; where nothing is drawn by chance, there is no noise to tell."""

    def is_there(name: str) -> bool:
        return bool(getattr(settings, name)) and (settings.temperature > 0 or name != "shared_noise")

    return {name: change for name, change in PIECES.items() if all(map(is_there, change))}


def ablation(settings: CalibrateConfig, replays: Replays, plan_of: PlanOf) -> dict[str, dict[str, float]]:
    """Predicted speed and acceptance length of the learned plan without one of its pieces at a time."""
    found = {}
    for name, change in pieces(settings).items():
        changed = replace(settings, **change)
        plans = [plan_of(kind, changed, replays) for kind in ("learned", "learned_ngrams")[: 1 + changed.ngrams]]
        best = max(replay_of(replays, plan).run(plan) for plan in plans)
        found[name] = dict(zip(("tokens_per_second", "acceptance_length"), best, strict=True))
    return found


def frontier(
    settings: CalibrateConfig, replays: Replays, names: Iterable[str], plan_of: PlanOf
) -> dict[str, list[dict[str, float]]]:
    """Predicted speed and acceptance length of the best plan of each kind with some of the widths as its most."""
    points: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    widths = sorted({width for width in settings.widths if width > 1})
    for width in widths[:: -max(1, len(widths) // POINTS)][::-1]:
        narrow = replace(settings, widths=[w for w in settings.widths if w <= width])
        for name in points:
            plan = plan_of(name, narrow, replays)
            speed, acceptance_length = replay_of(replays, plan).run(plan)
            points[name].append({"width": width, "tokens_per_second": speed, "acceptance_length": acceptance_length})
    return points


def describe(plan: Plan) -> str:
    """Passes, thresholds and rows of each stage, and what is retrieved from, in one line."""
    looked_up = "n-grams" if plan.ngrams else "matrix"
    if plan.scale and not plan.learns_accepted:
        looked_up += " taught by all nodes"
    asked = ((looked_up, plan.expands), ("echo", plan.echoes))
    sources = ", ".join(name for name, is_asked in asked if is_asked)
    parts = []
    for stage in plan.stages:
        last = stage is plan.stages[-1]
        rule = "" if last else f" if <= {stage.threshold:.2f}" if stage.passes else f" if > {stage.threshold:.2f}"
        rows = stage.width or f"1+{stage.drafted}+{stage.retrieved}"
        parts.append(f"{stage.passes}{rule}: {rows}")
    return "; ".join(parts) + (f" ({sources})" if sources else "")


def rows_of(report: dict[str, Any], plans: dict[str, Plan]) -> list[tuple[str, ...]]:
    """plan, stages, predicted and measured tokens/s, the prediction's error, acceptance length, laps, ratio to the fastest."""
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
    "passes: rows",
    "predicted",
    "measured",
    "error",
    "acceptance_length",
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
    if race["variation"] > UNSTEADY:
        found.append(
            f"These figures cannot be trusted: within the race the time of the same work varied by "
            f"{race['variation']:.0%}. Calibrate again on an idle machine, or raise policy.minutes for more laps."
        )
    if report["latency_contradicts"]:
        found.append(f"{CONTRADICTS[0].upper()}{CONTRADICTS[1:]}.")
    return found


def print_report(report: dict[str, Any], plans: dict[str, Plan]) -> None:
    """Stages and laps do not fit beside a plan's figures in a terminal: stages come below."""
    table = Table(title="plans on the calibration prompts, tokens/s", box=SIMPLE_HEAD, pad_edge=False)
    shown = [index for index, column in enumerate(HEADER) if column not in ("passes: rows", "laps")]
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
        f"that both ran. acceptance_length: of the prompts of those laps, predicted/measured. During the race the device took "
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
        "## Without one piece (predicted)",
        "",
        "| learned policy | tokens/s | acceptance |",
        "|---|---:|---:|",
        *(
            f"| {name} | {found['tokens_per_second']:.0f} | {found['acceptance_length']:.2f} |"
            for name, found in report["ablation"].items()
        ),
        "",
        "## Latency, ms",
        "",
        f"| context | {' | '.join(f'{width} rows' for width in latency['widths'])} |",
        "|---|" + "---:|" * len(latency["widths"]),
        *(
            f"| {context} | {' | '.join(f'{time:.2f}' for time in times)} |"
            for context, times in zip(latency["contexts"], latency["verify_ms"], strict=True)
        ),
        "",
        f"Head passes 0, 1, ...: {_times(latency['draft_ms'])}. Without retrieval, with the matrix and with longer "
        f"contexts, choosing the tree takes {_times(latency['graft_ms'])}, acceptance and commit "
        f"{_times(latency['commit_ms'])}; one more host read {latency['read_ms']:.2f}, the search of "
        f"the request's own text {latency['echo_ms']:.2f}. "
        f"Interquartile range over median of a round: {latency['spread'][0]:.0%} typically, "
        f"{latency['spread'][1]:.0%} at most.",
        "",
        "![speed against acceptance length](frontier.png)",
        "",
    ]
    return "\n".join(lines)


def _times(milliseconds: list[float]) -> str:
    return ", ".join(f"{time:.2f}" for time in milliseconds)


def draw_frontier(report: dict[str, Any], path: Path) -> None:
    """Speed against acceptance length: predicted along the widths, measured as stars."""
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

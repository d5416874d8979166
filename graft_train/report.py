"""The evaluation as people read it: a table in the terminal, Markdown, one picture."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = (
    "method",
    "tokens/s",
    "speed-up",
    "95 %",
    "tau",
    "draft",
    "verify",
    "other",
    "drafted",
    "retrieved",
    "lossless",
)


def rows_of(evaluation: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per method, in COLUMNS; times in ms per round, accepted tokens per round by source."""
    rows: list[tuple[str, ...]] = []
    for name, method in evaluation["methods"].items():
        phases = method["ms_per_round"]
        low, high = method["speedup_interval"]
        rows.append(
            (
                name,
                f"{method['tokens_per_second']:.1f}",
                f"{method['speedup']:.2f}x",
                f"{low:.2f}-{high:.2f}",
                f"{method['tau']:.2f}",
                f"{phases['draft']:.2f}",
                f"{phases['verify']:.2f}",
                f"{phases['graft'] + phases['commit']:.2f}",
                f"{method['accepted_per_round']['drafted']:.2f}",
                f"{method['accepted_per_round']['retrieved']:.2f}",
                "yes" if evaluation["lossless"][name] else "NO",
            )
        )
    return rows


def print_table(evaluation: dict[str, Any]) -> None:
    """The columns that fit a terminal."""
    table = Table(title="held-out prompts; draft, verify, other in ms per round", caption=_machine(evaluation))
    shown = [index for index, column in enumerate(COLUMNS) if column not in ("95 %", "drafted", "retrieved")]
    for index in shown:
        table.add_column(COLUMNS[index], justify="right" if index else "left", no_wrap=True)
    for row in rows_of(evaluation):
        table.add_row(*(row[index] for index in shown), style="bold" if row[0] == "graft" else None)
    Console().print(table)


def to_markdown(evaluation: dict[str, Any]) -> str:
    """The table, how it was measured, and the stages at which rounds stopped."""
    settings = evaluation["settings"]
    header = [f"| {' | '.join(COLUMNS)} |", f"|---|{'---:|' * (len(COLUMNS) - 1)}"]
    body = [f"| {' | '.join(row)} |" for row in rows_of(evaluation)]
    low, high = settings["prompt_tokens"]
    facts = [
        f"- device: {_machine(evaluation)}",
        f"- {settings['dtype']}, batch 1, {settings['attention']}, no graphs, no compilation",
        f"- temperature {settings['temperature']}; {settings['prompts']} held-out prompts of {low}-{high} tokens, "
        f"{settings['max_new_tokens']} new tokens each",
        f"- methods interleaved, {settings['repeats']} repeats, median per prompt; intervals by bootstrap over prompts",
        "- tokens/s is decoding alone, prefill apart; speed-up is against autoregressive decoding in the same engine",
        "- tau: tokens per target pass, bonus token included; draft, verify, other: ms per round",
        "- lossless: greedy fp32 tokens equal transformers' own `generate` on every prompt",
        f"- successor matrix: {settings['matrix']}",
    ]
    stages = [f"- {name}: {_stages(method['stages'])}" for name, method in evaluation["methods"].items()]
    outside = max(abs(method["time_outside_phases"]) for method in evaluation["methods"].values())
    facts.append(f"- wall time outside the phases: at most {outside:.1%}")
    return "\n".join(
        ["# Evaluation", "", *header, *body, "", "## How", "", *facts, "", "## Rounds by stage", "", *stages, ""]
    )


def draw(evaluation: dict[str, Any], path: Path) -> None:
    """Speed with intervals, where a round's time goes, and where its tokens come from."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods = evaluation["methods"]
    names = list(methods)
    figure, (speed, time, tokens) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    colors = ["#c2410c" if name == "graft" else "#94a3b8" for name in names]
    ratios = [methods[name]["speedup"] for name in names]
    below = [ratio - methods[name]["speedup_interval"][0] for ratio, name in zip(ratios, names, strict=True)]
    above = [methods[name]["speedup_interval"][1] - ratio for ratio, name in zip(ratios, names, strict=True)]
    errors = [[max(value, 0) for value in side] for side in (below, above)]
    bars = speed.barh(names, ratios, xerr=errors, color=colors, error_kw={"elinewidth": 1, "capsize": 3})
    speed.bar_label(bars, [f"{methods[name]['tokens_per_second']:.0f} tokens/s" for name in names], padding=8)
    speed.set(title="speed-up over autoregressive", xlim=(0, 1.45 * max(ratios)))
    _stacked(
        time,
        names,
        {phase: [methods[n]["ms_per_round"][phase] for n in names] for phase in ("draft", "graft", "verify", "commit")},
        "ms per round",
    )
    _stacked(
        tokens,
        names,
        {
            source: [methods[n]["accepted_per_round"][source] for n in names]
            for source in ("bonus", "drafted", "retrieved")
        },
        "tokens per round (tau)",
    )
    for axes in (speed, time, tokens):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    time.set_yticklabels([])
    tokens.set_yticklabels([])
    figure.suptitle(_machine(evaluation), fontsize=9, color="#475569")
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=150, format="png")
    plt.close(figure)
    aside.rename(path)


def _stacked(axes: Any, names: list[str], parts: dict[str, list[float]], title: str) -> None:
    left = [0.0] * len(names)
    for (label, values), color in zip(parts.items(), ("#0f766e", "#c2410c", "#334155", "#cbd5e1"), strict=False):
        axes.barh(names, values, left=left, label=label, color=color)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.set_title(title)
    axes.legend(frameon=False, ncols=len(parts), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _stages(stages: dict[str, int]) -> str:
    total = sum(stages.values()) or 1
    return ", ".join(f"{name} {count / total:.0%}" for name, count in stages.items())


def _machine(evaluation: dict[str, Any]) -> str:
    device = evaluation["device"]
    return (
        f"{device['name']}, {device['threads']} threads, torch {device['torch']}, transformers {device['transformers']}"
    )

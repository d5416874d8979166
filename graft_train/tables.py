"""The evaluation as people read it: a table in the terminal, Markdown, one picture."""

from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from graft_inference import METHODS
from graft_inference.files import replace_file
from graft_inference.policy.fallback import AS_PLANNED, MEASURED
from graft_train.processes import say
from graft_train.steadiness import distrust

COLUMNS = (
    "method",
    "tokens/s",
    "speed-up",
    "95 %",
    "acceptance",
    "draft",
    "verify",
    "other",
    "drafted",
    "retrieved",
    "lossless",
)
PARTED = ("graft", "eagle3", "retrieve")
"""Methods that the smaller tables show."""
PALETTE = ("#0f766e", "#c2410c", "#334155", "#cbd5e1", "#5eead4", "#fdba74")


def asked_of(settings: dict[str, Any]) -> str:
    """Which prompts an evaluation is of."""
    suite, path = settings.get("suite"), settings.get("path")
    if suite:
        return f"prompts of {suite}" + (f" ({path})" if path else "")
    return f"prompts of {path}" if path else "held-out prompts of the run's own data"


def rows_of(evaluation: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per method, in COLUMNS; times in ms per round, accepted tokens per round by source."""
    rows: list[tuple[str, ...]] = []
    for name in METHODS:
        method = evaluation["methods"][name]
        phases = method["ms_per_round"]
        low, high = method["speedup_interval"]
        rows.append(
            (
                name,
                f"{method['tokens_per_second']:.1f}",
                f"{method['speedup']:.2f}x",
                f"{low:.2f}-{high:.2f}",
                f"{method['acceptance_length']:.2f}",
                f"{phases['draft']:.2f}",
                f"{phases['verify']:.2f}",
                f"{phases['graft'] + phases['commit']:.2f}",
                f"{method['accepted_per_round']['drafted']:.2f}",
                f"{_retrieved(method):.2f}",
                {True: "yes", False: "NO", None: "not checked"}[evaluation["lossless"][name]],
            )
        )
    return rows


def unsteady(evaluation: dict[str, Any], work: str = "plain decoding") -> str | None:
    """What is said beside the figures of a machine that was not steady, or of which that is not known."""
    if "variation" not in evaluation:
        return None  # of an earlier version
    repeats = 2 * evaluation["settings"]["repeats"]
    more = f"with more repeats (evaluation.repeats={repeats}, once this evaluation is deleted)"
    if evaluation["variation"] is None:
        return f"Whether the machine was steady is not known, as the same work was timed once: measure {more}."
    return distrust(evaluation["variation"], f"the same {work}", more)


class Part(NamedTuple):
    """A smaller table."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def parts_of(evaluation: dict[str, Any]) -> list[Part]:
    """What the methods reach by category, where there are several, by position in the answer and by context length."""
    methods = [evaluation["methods"][name] for name in PARTED]
    parts = [
        ("tokens per round, by position in the answer", "by_position"),
        ("tokens per round, by context length", "by_context"),
    ]
    tables = [Part(title, ("tokens", *PARTED), _bucket_rows([found[key] for found in methods])) for title, key in parts]
    if len(categories_of(evaluation)) > 1:
        rows = [_category_row(name, methods) for name in categories_of(evaluation)]
        tables.insert(0, Part("speed-up and acceptance length by category", ("category", "prompts", *PARTED), rows))
    return tables


def categories_of(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What graft gains by category; empty outside a suite."""
    found: dict[str, Any] = evaluation["methods"]["graft"].get("by_category", {})
    return found


def _category_row(name: str, methods: list[dict[str, Any]]) -> tuple[str, ...]:
    found = [method["by_category"].get(name) for method in methods]
    shown = (f"{one['speedup']:.2f}x {one['acceptance_length']:.2f}" if one else "-" for one in found)
    return (name, str(methods[0]["by_category"][name]["prompts"]), *shown)


def _bucket_rows(methods: list[list[dict[str, Any]]]) -> list[tuple[str, ...]]:
    """Of each bucket, what every method accepts in it; one may have had no round there."""
    ends = {bucket["from"]: bucket["to"] for buckets in methods for bucket in buckets}
    lengths = [{bucket["from"]: f"{bucket['acceptance_length']:.2f}" for bucket in buckets} for buckets in methods]
    return [(f"{low}-{ends[low]}", *(length.get(low, "-") for length in lengths)) for low in sorted(ends)]


def print_table(evaluation: dict[str, Any]) -> None:
    """The speeds, and the smaller tables."""
    print_speeds(evaluation)
    for part in parts_of(evaluation):
        show_table(*part)


def print_speeds(evaluation: dict[str, Any]) -> None:
    """The columns that fit a terminal, and what is to be said of them."""
    shown = [index for index, column in enumerate(COLUMNS) if column not in ("95 %", "drafted", "retrieved")]
    title = f"{asked_of(evaluation['settings'])}; draft, verify, other in ms per round"
    rows = [tuple(row[index] for index in shown) for row in rows_of(evaluation)]
    show_table(title, tuple(COLUMNS[index] for index in shown), rows, machine(evaluation))
    if doubt := unsteady(evaluation):
        print(f"note: {doubt}")
    if narrower := _narrower(evaluation):
        print(
            f"note: in {narrower:.1%} of graft's rounds its plan did not pay: a narrower one, or none, took its place"
        )
    for name in _twins(evaluation["settings"]):
        print(f"note: graft's calibrated plan is that of {name}; these rows show one method")


def show_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]], caption: str | None = None) -> None:
    """In the terminal."""
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == "graft" else None)
    Console().print(table)


def markdown_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Its lines."""
    header = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return [*header, *(f"| {' | '.join(row)} |" for row in rows)]


def to_markdown(evaluation: dict[str, Any]) -> str:
    """The table, how it was measured, and the checkpoints at which rounds stopped."""
    settings = evaluation["settings"]
    low, high = settings["prompt_tokens"]
    graphs = "CUDA graphs (where a round has one, verify includes other)" if settings["graphs"] else "no graphs"
    lossless = "greedy fp32 tokens equal transformers' own `generate` on every prompt"
    if None in evaluation["lossless"].values():
        lossless = "not checked (evaluation.check_lossless=false)"
    facts = [
        f"- device: {machine(evaluation)}",
        f"- {settings['dtype']}, batch 1, {settings['attention']}, {graphs}, no compilation",
        f"- temperature {settings['temperature']}; {settings['prompts']} {asked_of(settings)}, of {low}-{high} tokens, "
        f"{settings['max_new_tokens']} new tokens each",
        f"- methods interleaved, {settings['repeats']} repeats, median per prompt; intervals by bootstrap over prompts",
        "- tokens/s is decoding alone, prefill apart; speed-up is against autoregressive decoding in the same engine",
        "- acceptance: tokens per target pass, bonus token included; draft, verify, other: ms per round",
        f"- lossless: {lossless}",
        f"- successor matrix: {settings['matrix']}",
    ]
    checkpoints = [f"- {name}: {_shown(evaluation['methods'][name]['checkpoints'])}" for name in METHODS]
    outside = max(abs(method["time_outside_phases"]) for method in evaluation["methods"].values())
    facts.append(f"- wall time outside the phases: at most {outside:.1%}")
    if not settings["temperature"]:
        same = min(method["same_tokens_as_autoregressive"] for method in evaluation["methods"].values())
        facts.append(f"- timed in {settings['dtype']}: the autoregressive tokens on at least {same:.0%} of the prompts")
    if fallback := evaluation["methods"]["graft"]["fallback"]:
        shares = ", ".join(f"{reason} {share:.1%}" for reason, share in shares_of(fallback).items())
        facts.append(f"- rounds of graft by what its fallback chose: {shares}")
    facts.append(
        f"- {settings['repetition']:.0%} of the answers' 8-token windows repeat earlier text of the same request"
    )
    facts += [
        f"- **graft's calibrated plan is that of {name}**: these rows show one method" for name in _twins(settings)
    ]
    for name, found in evaluation["divergences"].items():
        facts.append(
            f"- **{name} is not lossless**: first at token {found[0]['position']} of prompt {found[0]['prompt']}, "
            f"where the target's two highest logits are {found[0]['top2_margin']:.1e} apart"
        )
    parts = [
        line
        for title, columns, rows in parts_of(evaluation)
        for line in (f"## {title.capitalize()}", "", *markdown_table(columns, rows), "")
    ]
    table = markdown_table(COLUMNS, rows_of(evaluation))
    return "\n".join(
        [
            "# Evaluation",
            "",
            *table,
            "",
            *([f"**{doubt}**", ""] if (doubt := unsteady(evaluation)) else []),
            "## How",
            "",
            *facts,
            "",
            *parts,
            "## Rounds by checkpoint",
            "",
            *checkpoints,
            "",
        ]
    )


def draw(evaluation: dict[str, Any], path: Path) -> None:
    """Speed with intervals, a round's time by phase, its tokens by source, and where rounds stopped."""
    try:
        import matplotlib
    except ImportError:
        say(f"no {path.name}: matplotlib is not installed")
        return

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods, names = evaluation["methods"], list(METHODS)
    figure, panels = plt.subplots(
        1, 4, figsize=(15.5, 3.8), layout="constrained", width_ratios=(5, 4, 4, 3), sharey=True
    )
    speed, time, tokens, stopped = panels
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
            "bonus": [methods[n]["accepted_per_round"]["bonus"] for n in names],
            "drafted": [methods[n]["accepted_per_round"]["drafted"] for n in names],
            "retrieved": [_retrieved(methods[n]) for n in names],
        },
        "tokens per round (acceptance length)",
    )
    shares = {name: shares_of(methods[name]["checkpoints"]) for name in names}
    checkpoints = sorted({one for share in shares.values() for one in share}, key=depth_of)
    _stacked(
        stopped,
        names,
        {one: [100 * shares[name].get(one, 0.0) for name in names] for one in checkpoints},
        "% of rounds by checkpoint",
    )
    speed.invert_yaxis()  # and, shared, every other one's
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(machine(evaluation), fontsize=9, color="#475569")
    replace_file(path, lambda aside: figure.savefig(aside, dpi=150, format="png"))
    plt.close(figure)


def _stacked(axes: Any, names: list[str], parts: dict[str, list[float]], title: str) -> None:
    left = [0.0] * len(names)
    for index, (label, values) in enumerate(parts.items()):
        axes.barh(names, values, left=left, label=label, color=PALETTE[index % len(PALETTE)])
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.set_title(title)
    axes.legend(frameon=False, ncols=len(parts), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _retrieved(method: dict[str, Any]) -> float:
    """Tokens per round from the matrix and by lookup."""
    return sum(count for source, count in method["accepted_per_round"].items() if source not in ("drafted", "bonus"))


def _narrower(evaluation: dict[str, Any]) -> float:
    """Share of graft's rounds for which its fallback found that the plan did not pay."""
    shares = shares_of(evaluation["methods"]["graft"]["fallback"])
    return sum(share for reason, share in shares.items() if reason not in (AS_PLANNED, MEASURED))


def _twins(settings: dict[str, Any]) -> list[str]:
    """Methods whose plan calibration also chose for graft, so that the hybrid itself was not measured."""
    plans = settings["plans"]
    return [name for name in METHODS if name != "graft" and plans[name] == plans["graft"]]


def _shown(checkpoints: dict[str, int]) -> str:
    shares = shares_of(checkpoints)
    return ", ".join(f"{name} {shares[name]:.0%}" for name in sorted(shares, key=depth_of))


def shares_of(checkpoints: dict[str, int]) -> dict[str, float]:
    """Part of the rounds that stopped at each checkpoint."""
    total = sum(checkpoints.values())
    return {name: count / total for name, count in checkpoints.items()}


def depth_of(checkpoint: str) -> int:
    """By which checkpoints are ordered; "none", where no head runs, comes first."""
    return -1 if checkpoint == "none" else int(checkpoint[1:])


def machine(evaluation: dict[str, Any]) -> str:
    """What it was measured on."""
    device = evaluation["device"]
    return (
        f"{device['name']}, {device['threads']} threads, torch {device['torch']}, transformers {device['transformers']}"
    )

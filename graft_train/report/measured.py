"""The sections on what was measured: every evaluation of the run."""

from collections.abc import Iterator
from typing import Any

from graft_inference import METHODS, GraftError
from graft_inference.files import read_json
from graft_train.chat import NAMES
from graft_train.report import charts
from graft_train.report.blocks import Beside, Cards, Folded, Heading, Plot, Table, Text
from graft_train.run_directory import RunDirectory
from graft_train.server_tables import COLUMNS as SERVER_COLUMNS
from graft_train.server_tables import rows_of as server_rows
from graft_train.tables import COLUMNS, PARTED, asked_of, categories_of, depth_of, machine, parts_of, rows_of, shares_of

Blocks = Iterator[Any]
PHASES = {"draft": "draft", "graft": "look up, choose", "verify": "verify", "commit": "accept, keep"}


def evaluations_of(run: RunDirectory) -> list[tuple[str, dict[str, Any]]]:
    """Every evaluation that holds methods or servers, by what was asked.

    Raises:
        GraftError: there is none.
    """
    paths = run.evaluations()
    if not paths:
        run.directory("evaluation")
    found = [read_json(path / "evaluation.json", f"delete {path} and run graft evaluate") for path in paths]
    return [(asked_of(one["settings"]), one) for one in found]


def _of_methods(run: RunDirectory) -> list[tuple[str, dict[str, Any]]]:
    """Those of this engine. Raises GraftError where there is none, or one of them measured nothing."""
    found = [(asked, one) for asked, one in evaluations_of(run) if "servers" not in one]
    if not found:
        raise GraftError("only servers were evaluated: graft evaluate without evaluation.server measures the methods")
    for asked, one in found:
        _check_measured(asked, one)
    return found


def _check_measured(asked: str, one: dict[str, Any]) -> None:
    if not one["methods"]:
        raise GraftError(f"the evaluation of {asked} is empty: delete its directory and run graft evaluate")


def speed(run: RunDirectory) -> Blocks:
    found = evaluations_of(run)
    for number, (asked, one) in enumerate(found):
        yield from [Heading(asked[0].upper() + asked[1:])] if len(found) > 1 else []
        if "servers" in one:
            yield Table(SERVER_COLUMNS, server_rows(one))
            continue
        _check_measured(asked, one)
        if not number:
            yield _headline(one)
        rows = [
            {
                "method": name,
                "speedup": method["speedup"],
                "low": method["speedup_interval"][0],
                "high": method["speedup_interval"][1],
                "tokens_per_second": method["tokens_per_second"],
            }
            for name, method in _methods(one)
        ]
        settings = one["settings"]
        yield Plot("Speed-up over autoregressive decoding, and its 95 % interval", charts.speed(rows))
        yield Table(COLUMNS, rows_of(one), strong="graft")
        yield Text(
            f"{settings['prompts']} {asked}, {settings['max_new_tokens']} new tokens each, temperature "
            f"{settings['temperature']}, {settings['dtype']}, batch 1; {machine(one)}. Intervals by bootstrap over "
            "prompts. Acceptance is tokens per pass of the target; draft, verify and other are ms per round; drafted "
            "and retrieved are accepted tokens per round."
        )


def _headline(one: dict[str, Any]) -> Cards:
    graft = one["methods"]["graft"]
    low, high = graft["speedup_interval"]
    lossless = {True: "yes", False: "no", None: "not checked"}[one["lossless"]["graft"]]
    return Cards(
        (
            (f"{graft['speedup']:.2f}x", "speed-up", f"95 %: {low:.2f} to {high:.2f}"),
            (f"{graft['acceptance_length']:.2f}", "tokens per round", "for one pass of the target"),
            (f"{graft['tokens_per_second']:.1f}", "tokens/s", machine(one)),
            (lossless, "lossless", "greedy fp32 tokens are those of transformers alone"),
        )
    )


def acceptance(run: RunDirectory) -> Blocks:
    found = _of_methods(run)
    for asked, one in found:
        yield from [Heading(asked[0].upper() + asked[1:])] if len(found) > 1 else []
        rows = [
            {"method": method, "source": name, "tokens": _by_name(figures["accepted_per_round"], name)}
            for method, figures in _methods(one)
            for name in charts.SOURCE_COLORS | dict.fromkeys(NAMES.values())
        ]
        yield Plot(
            "By source",
            charts.stacked(rows, "source", "tokens", "tokens per round", charts.SOURCE_COLORS),
            "What several proposed counts for the first of them. The target adds one token itself in every round.",
        )
        yield Beside(
            [
                Plot(title, charts.by_bucket(_bucket_rows(one, key), "tokens"))
                for key, title in (("by_position", "By position in the answer"), ("by_context", "By context length"))
            ]
        )
        if len(categories_of(one)) > 1:
            rows = [
                {"method": method, "category": name, **figures}
                for method, measured in _methods(one)
                if method in PARTED
                for name, figures in measured["by_category"].items()
            ]
            yield Beside(
                [
                    Plot("Speed-up by category", charts.grouped(rows, "category", "speedup", "speed-up")),
                    Plot(
                        "Acceptance by category",
                        charts.grouped(rows, "category", "acceptance_length", "tokens per round"),
                    ),
                ]
            )
        parts = [Table(part.columns, part.rows, title=part.title.capitalize()) for part in parts_of(one)]
        yield Folded("As tables", parts)


def _bucket_rows(one: dict[str, Any], key: str) -> list[dict[str, Any]]:
    rows = [
        {"method": method, "bucket": f"{bucket['from']}–{bucket['to']}", **bucket}
        for method, figures in _methods(one)
        if method in PARTED
        for bucket in figures[key]
    ]
    return sorted(rows, key=lambda row: row["from"])


def time(run: RunDirectory) -> Blocks:
    found = _of_methods(run)
    for asked, one in found:
        yield from [Heading(asked[0].upper() + asked[1:])] if len(found) > 1 else []
        times = [
            {"method": method, "phase": PHASES[phase], "ms": figures["ms_per_round"][phase]}
            for method, figures in _methods(one)
            for phase in PHASES
        ]
        shares = {method: shares_of(figures["checkpoints"]) for method, figures in _methods(one)}
        names = sorted({name for share in shares.values() for name in share}, key=depth_of)
        stops = [
            {"method": method, "checkpoint": name, "share": 100 * share.get(name, 0.0)}
            for method, share in shares.items()
            for name in names
        ]
        colors = {PHASES[phase]: color for phase, color in charts.PHASE_COLORS.items()}
        yield Beside(
            [
                Plot(
                    "Milliseconds of a round",
                    charts.stacked(times, "phase", "ms", "ms per round", colors),
                    "A method is as fast as its tokens per round, divided by these milliseconds.",
                ),
                Plot(
                    "Where rounds stopped drafting",
                    charts.stacked(stops, "checkpoint", "share", "% of rounds", {"none": "var(--plain)"}),
                    "d0 stopped after one draft step, d1 after two. In rounds of “none” no head ran.",
                ),
            ]
        )
        if fallback := shares_of(one["methods"]["graft"]["fallback"]):
            rows = [(reason, f"{share:.1%}") for reason, share in fallback.items()]
            yield Table(("what the fallback chose", "of graft's rounds"), rows)


def _methods(evaluation: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, evaluation["methods"][name]) for name in METHODS]


def _by_name(accepted: dict[str, float], name: str) -> float:
    """Tokens of all sources that people call by one name."""
    return sum(count for source, count in accepted.items() if NAMES[source] == name)

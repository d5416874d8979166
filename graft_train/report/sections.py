"""The page's sections, each from the files of one stage; one that cannot be made says why."""

from collections.abc import Callable, Iterator
from typing import Any

from graft_inference import METHODS, GraftError, Policy
from graft_inference.files import read_json
from graft_train.chat import NAMES
from graft_train.inspect import in_words
from graft_train.report import charts
from graft_train.report.blocks import Beside, Cards, Folded, Heading, Missing, Plot, Rounds, Section, Table, Text
from graft_train.run_directory import RunDirectory
from graft_train.server_tables import COLUMNS as SERVER_COLUMNS
from graft_train.server_tables import rows_of as server_rows
from graft_train.stage import RECORD
from graft_train.tables import COLUMNS, PARTED, asked_of, categories_of, machine, parts_of, rows_of, shares_of

Blocks = Iterator[Any]
OTHER_VERSION = (KeyError, TypeError, IndexError, AttributeError)
"""What reading a file of another shape raises. GraftError, a ValueError, says more for itself."""
PHASES = {"draft": "draft", "graft": "look up, choose", "verify": "verify", "commit": "accept, keep"}


def sections_of(run: RunDirectory, viewer: Any) -> list[Section]:
    """All of them.

    Args:
        viewer: the rounds that the trace viewer shows, or the reason why there are none.
    """
    return [
        _section("speed", "Speed", "evaluate", _speed, run),
        _section("acceptance", "Acceptance", "evaluate", _acceptance, run),
        _section("time", "Where a round's milliseconds go", "evaluate", _time, run),
        _section("rounds", "The rounds of an answer", "calibrate", lambda _: _rounds(viewer), run),
        _section("policy", "The policy", "calibrate", _policy, run),
        _section("calibration", "Is P(accepted) true?", "calibrate", _calibration, run),
        _section("training", "Training", "distill", _training, run),
        _section("corpus", "The corpus", "build_corpus", _corpus, run),
        _section("settings", "What was run", "the stage", _settings, run),
    ]


def _section(name: str, title: str, stage: str, blocks: Callable[[RunDirectory], Blocks], run: RunDirectory) -> Section:
    section = Section(name, title)
    try:
        section.blocks.extend(blocks(run))
    except GraftError as error:
        section.blocks.append(Missing(str(error)))
    except OTHER_VERSION as error:
        section.blocks.append(
            Missing(f"What is there has another shape ({error!r}), as of another version: run graft {stage} again.")
        )
    return section


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


def _speed(run: RunDirectory) -> Blocks:
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


def _acceptance(run: RunDirectory) -> Blocks:
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


def _time(run: RunDirectory) -> Blocks:
    found = _of_methods(run)
    for asked, one in found:
        yield from [Heading(asked[0].upper() + asked[1:])] if len(found) > 1 else []
        times = [
            {"method": method, "phase": PHASES[phase], "ms": figures["ms_per_round"][phase]}
            for method, figures in _methods(one)
            for phase in PHASES
        ]
        stops = [
            {"method": method, "checkpoint": name, "share": 100 * share}
            for method, figures in _methods(one)
            for name, share in shares_of(figures["checkpoints"]).items()
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
                    "d0 stopped behind one draft step, d1 behind two. In rounds of “none” no head ran.",
                ),
            ]
        )
        if fallback := shares_of(one["methods"]["graft"]["fallback"]):
            rows = [(reason, f"{share:.1%}") for reason, share in fallback.items()]
            yield Table(("what the fallback chose", "of graft's rounds"), rows)


def _rounds(viewer: Any) -> Blocks:
    yield Missing(viewer) if isinstance(viewer, str) else Rounds()


def _policy(run: RunDirectory) -> Blocks:
    policy = Policy.from_dict(run.read("policy", "policy.json"))
    report = run.read("policy", "report.json")
    rows = [(name, in_words(policy.plan(name))) for name in METHODS]
    yield Table(("method", "what its plan does"), rows, figures=False)
    predicted = [{"plan": name, **point} for name, points in report["frontier"].items() for point in points]
    measured = [{"plan": name, **report["measured"][name]} for name in report["frontier"]]
    yield Plot(
        "Speed against acceptance",
        charts.frontier(predicted, measured),
        "Lines: what replay foretold, by the widest verification allowed. Diamonds: measured in the race. "
        f"graft is the plan “{report['graft_is']}”.",
    )
    yield Table(
        ("plan", "tokens/s foretold", "tokens/s measured", "of the fastest", "95 %"),
        [
            (
                name,
                f"{report['predicted'][name]['tokens_per_second']:.1f}",
                f"{found['tokens_per_second']:.1f}",
                f"{found['over_fastest'][0]:.2f}x",
                f"{found['over_fastest'][1]:.2f}-{found['over_fastest'][2]:.2f}",
            )
            for name, found in report["measured"].items()
        ],
        strong=report["graft_is"],
    )


def _calibration(run: RunDirectory) -> Blocks:
    errors = {name: found for name, found in run.read("policy", "report.json")["calibration_error"].items() if found}
    if not errors:
        raise GraftError("one traced prompt alone says nothing of others: raise policy.prompts and calibrate again")
    if not all("curves" in found for found in errors.values()):
        raise GraftError("this policy is of a version that kept no curves: delete policy and run graft calibrate")
    plots = []
    for when, title in (("after", "Fitted, as plans use it"), ("before", "The proposers' own word")):
        rows = [
            {"proposer": NAMES[name], "claimed": claimed, "met": met, "nodes": nodes}
            for name, found in errors.items()
            for claimed, met, nodes in found["curves"][when]
        ]
        plots.append(Plot(title, charts.calibration(rows)))
    yield Beside(plots)
    yield Table(
        ("proposer", "error before", "error after", "nodes"),
        [
            (NAMES[name], f"{found['before']:.2%}", f"{found['after']:.2%}", f"{found['nodes']:,}")
            for name, found in errors.items()
        ],
    )
    yield Text("On the dashed line a proposer is right about itself. Of nodes on prompts that the fit has not seen.")


def _training(run: RunDirectory) -> Blocks:
    lines = run.metrics()
    logged = [line for line in lines if "loss" in line]
    if not logged:
        raise GraftError("nothing was logged yet: graft distill writes a line every head.log_every steps")
    measured = [line for line in lines if "measured_acceptance_length" in line]
    lengths = [
        {"step": one["step"], "of": "estimated in training", "length": one["acceptance_length"]} for one in logged
    ]
    lengths += [
        {"step": one["step"], "of": "measured in the engine", "length": one["measured_acceptance_length"]}
        for one in measured
    ]
    yield Plot("Acceptance length of a greedy chain", charts.curves(lengths, "of", "length", "tokens per round"))
    plots = []
    for key, title, axis in (
        ("loss", "Loss by draft step", "loss"),
        ("conditional_acceptance", "Acceptance by draft step", "accepted, where all before it were"),
    ):
        rows = [
            {"step": line["step"], "draft step": str(number), "value": value}
            for line in logged
            for number, value in enumerate(line[key], start=1)
        ]
        plots.append(Plot(title, charts.curves(rows, "draft step", "value", axis)))
    yield Beside(plots)
    rates = [{"step": one["step"], "of": "learning rate", "rate": one["learning_rate"]} for one in logged]
    yield Folded("Learning rate", [Plot("Learning rate", charts.curves(rates, "of", "rate", "learning rate"))])
    summary = run.read("head", "training.json")
    validation = summary["validation"]
    facts = [
        ("samples trained on", f"{summary['samples']:,}"),
        ("optimizer steps", f"{summary['steps']:,}"),
        ("answers' tokens that can be drafted", f"{summary['coverage']:.2%}"),
    ]
    if validation:
        steps = " ".join(f"{share:.2f}" for share in validation["acceptance"])
        facts.append(("held-out samples", f"{summary['validation_samples']:,}"))
        facts.append(("held-out acceptance length, estimated", f"{validation['acceptance_length']:.2f}"))
        facts.append(("held-out acceptance by draft step", steps))
    if summary["measured_acceptance_length"] is not None:
        facts.append(("held-out acceptance length, in the engine", f"{summary['measured_acceptance_length']:.2f}"))
    yield Table(("of the training", ""), facts)


def _corpus(run: RunDirectory) -> Blocks:
    found = run.read("corpus", "inspection.json")
    recall = found["recall"]
    rows = [("tokens with successors", f"{found['rows_filled']:,} of {found['rows']:,}")]
    rows += [(name, f"{size / 1e6:.1f} MB") for name, size in found["bytes"].items()]
    if recall:
        rows += [
            ("held-out tokens", f"{found['held_out_tokens']:,}"),
            ("had successors listed", f"{recall['hit_rate']:.1%}"),
            ("of these, the true one first", f"{recall['top_1']:.1%}"),
            (f"of these, the true one among {recall['k']}", f"{recall['top_k']:.1%}"),
        ]
    yield Table(("of the corpus", ""), rows)
    examples = [
        (repr(row["token"]), "   ".join(f"{text!r} {chance:.2f}" for text, chance in row["successors"]))
        for row in found["examples"]
    ]
    yield Table(("token", "likeliest successors"), examples, title="The most frequent tokens", figures=False)


def _settings(run: RunDirectory) -> Blocks:
    records = [(path, read_json(path / RECORD, f"delete {path} and build it anew")) for path in run.found()]
    rows = []
    for path, record in records:
        versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
        took = f"{record['seconds'] / 60:.1f} min" if "seconds" in record else "not finished"
        rows.append(
            (path.name, f"graft {record.get('stage', '?')}", took, versions or "not told", record["fingerprint"])
        )
    yield Table(("directory", "made by", "took", "versions", "fingerprint"), rows, figures=False)
    for path, record in records:
        flat = [(name, str(value)) for name, value in _flat(record["settings"]).items()]
        inputs = [(f"input {name}", str(value)) for name, value in record["inputs"].items()]
        yield Folded(f"Settings of {path.name}", [Table(("setting", "value"), flat + inputs, figures=False)])


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat


def _methods(evaluation: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, evaluation["methods"][name]) for name in METHODS]


def _by_name(accepted: dict[str, float], name: str) -> float:
    """Tokens of all sources that people call by one name."""
    return sum(count for source, count in accepted.items() if NAMES[source] == name)

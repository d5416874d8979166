"""The page's sections, each from the files of one stage; one that cannot be made says why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from graft_inference import METHODS, GraftError, Policy
from graft_inference.files import read_json
from graft_train.chat import NAMES
from graft_train.inspect import in_words
from graft_train.report import charts
from graft_train.report.blocks import Beside, Folded, Missing, Plot, Rounds, Section, Table, Text
from graft_train.report.measured import Blocks, acceptance, speed, time
from graft_train.run_directory import RunDirectory
from graft_train.stage import RECORD

OTHER_VERSION = (KeyError, TypeError, IndexError, AttributeError, ValueError)
"""What reading a file of another shape raises. GraftError, a ValueError too, says more: it is caught first."""
MEASURED = {"policy": "report.json", "evaluation": "evaluation.json"}
"""The file that names the device, by the stage's directory."""


def sections_of(run: RunDirectory, viewer: Any) -> list[Section]:
    """All of them.

    Args:
        viewer: the rounds that the trace viewer shows, or the reason why there are none.
    """
    return [
        _section("speed", "Speed", "evaluate", speed, run),
        _section("acceptance", "Acceptance", "evaluate", acceptance, run),
        _section("time", "Where a round's milliseconds go", "evaluate", time, run),
        _section("rounds", "The rounds of an answer", "calibrate", lambda _: _rounds(viewer), run),
        _section("policy", "The policy", "calibrate", _policy, run),
        _section("calibration", "Calibration of P(accepted)", "calibrate", _calibration, run),
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
        "Lines: predicted by replay, by the widest verification allowed. Diamonds: measured in the race. "
        f"graft is the plan “{report['graft_is']}”.",
    )
    yield Table(
        ("plan", "tokens/s predicted", "tokens/s measured", "of the fastest", "95 %"),
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
    summary = run.read("head", "training.json") if (run.path / "head" / RECORD).is_file() else None
    yield Plot(
        "Acceptance length of a greedy chain",
        charts.curves(_lengths(lines, summary), "of", "length", "tokens per round"),
        "Where held-out samples stay far below those that are trained on, more data help, and more steps do not.",
    )
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
    if summary is None:
        run.directory("head")  # says what it waits for
    else:
        yield Table(("of the training", ""), _of_training(summary))


def _lengths(lines: list[dict[str, Any]], summary: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Acceptance lengths along the steps: of training batches, of held-out samples, and measured in the engine."""
    found = [(one["step"], "training batches, estimated", one.get("acceptance_length")) for one in lines]
    found += [(one["step"], "held out, in the engine", one.get("measured_acceptance_length")) for one in lines]
    if summary:
        held_out = summary["validation"] and summary["validation"]["acceptance_length"]
        found.append((summary["steps"], "held out, estimated", held_out))
        found.append((summary["steps"], "held out, in the engine", summary["measured_acceptance_length"]))
    return [{"step": step, "of": of, "length": length} for step, of, length in found if length is not None]


def _of_training(summary: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("samples trained on", f"{summary['samples']:,}"),
        ("optimizer steps", f"{summary['steps']:,}"),
        ("answers' tokens that can be drafted", f"{summary['coverage']:.2%}"),
    ]
    if validation := summary["validation"]:
        steps = " ".join(f"{share:.2f}" for share in validation["acceptance"])
        facts.append(("held-out samples", f"{summary['validation_samples']:,}"))
        facts.append(("held-out acceptance length, estimated", f"{validation['acceptance_length']:.2f}"))
        facts.append(("held-out acceptance by draft step", steps))
    if summary["measured_acceptance_length"] is not None:
        facts.append(("held-out acceptance length, in the engine", f"{summary['measured_acceptance_length']:.2f}"))
    return facts


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
            (path.name, f"graft {record.get('stage', '?')}", took, versions or "not recorded", record["fingerprint"])
        )
    yield Table(("directory", "made by", "took", "versions", "fingerprint"), rows, figures=False)
    devices = {
        path.name: read_json(path / MEASURED[path.name.partition("-")[0]]).get("device") for path in _measured(run)
    }
    told = [(name, ", ".join(f"{part} {value}" for part, value in one.items())) for name, one in devices.items() if one]
    if told:
        yield Table(("directory", "measured on"), told, figures=False)
    for path, record in records:
        flat = [(name, str(value)) for name, value in _flat(record["settings"]).items()]
        inputs = [(f"input {name}", str(value)) for name, value in record["inputs"].items()]
        yield Folded(f"Settings of {path.name}", [Table(("setting", "value"), flat + inputs, figures=False)])


def _measured(run: RunDirectory) -> list[Path]:
    """The directories of finished stages that measured a device."""
    return [path for path in run.found() if path.name.partition("-")[0] in MEASURED]


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat

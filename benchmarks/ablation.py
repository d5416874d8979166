"""What each piece of the learned policy is worth: the best plan without it, one piece at a time.

    python benchmarks/ablation.py --run runs/quickstart

Replays plans over the traces of a finished run under its measured latencies: it loads no model and takes no time on
the device. Speed and acceptance length are predictions on the calibration prompts, made of the very traces that the
plans were fitted to. `policy.py` measures plans on other prompts.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from graft_inference import AcceptanceModel, GraftError
from graft_inference.template import depth_template
from graft_train.calibrate import looked_up, replays_of
from graft_train.calibrate.fit import raw_acceptance
from graft_train.calibrate.latency import Latency
from graft_train.calibrate.measure import load_traces, told_traces
from graft_train.calibrate.replay import Replay
from graft_train.calibrate.report import describe
from graft_train.calibrate.search import Allowed, best_learned
from graft_train.config.policy import CalibrateConfig

Changed = tuple[str, Replay, AcceptanceModel, Allowed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    print(ablation(parser.parse_args().run / "policy"))


def ablation(directory: Path) -> str:
    """A Markdown table of the plan with all pieces and of those without one, from what `calibrate` wrote there."""
    settings, latency = read(directory)
    lines = [
        "| without | tokens/s | of the whole | acceptance length | steps: nodes |",
        "|---|---:|---:|---:|---|",
    ]
    whole = None
    for name, replay, model, allowed in without_pieces(settings, directory, latency):
        plan = best_learned(replay, model, allowed)
        speed, acceptance_length = replay.run(plan)
        whole = whole or speed
        lines.append(f"| {name} | {speed:.1f} | {speed / whole:.3f}x | {acceptance_length:.2f} | {describe(plan)} |")
    return "\n".join(lines)


def read(directory: Path) -> tuple[CalibrateConfig, Latency]:
    """The settings that a policy was learned with, and the latencies of the device.

    Raises:
        GraftError: one of them is missing.
    """
    try:
        stage = json.loads((directory / "stage.json").read_text(encoding="utf-8"))
        latency = json.loads((directory / "latency.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise GraftError(f"{error.filename} is missing: run graft calibrate first") from error
    names = {one.name for one in fields(CalibrateConfig)} & stage["settings"].keys()
    return CalibrateConfig(**{name: stage["settings"][name] for name in names}), Latency(**latency)


def without_pieces(settings: CalibrateConfig, directory: Path, latency: Latency) -> Iterator[Changed]:
    """What a plan is made of: all pieces, then all but one."""
    traces = load_traces(settings, directory, made_of={})
    replays = replays_of(settings, traces, latency)
    replay = replays[True in replays]
    most = 2 * max(settings.num_draft_tokens)
    model = looked_up(replay.fitted, most)
    allowed = Allowed(tuple(sorted({*settings.num_draft_tokens})), settings.checkpoints)
    yield "nothing", replay, model, allowed
    yield "the fit of P(accepted)", replay, looked_up(raw_acceptance(told_traces(traces)), most), allowed
    yield "early stops", replay, model, replace(allowed, checkpoints=0)
    yield "leaving out the head", replay, model, replace(allowed, retrieve_first=False)
    yield "the head", replay, replace(model, drafted=()), allowed
    for source in model.sources:
        others = tuple(one for one in model.sources if one is not source)
        yield f"the {source.name}", replay, replace(model, sources=others), allowed
    template = hand_made(replay.fitted, settings.retrieval_depth)
    yield "the learned template", replay, looked_up(template, most), allowed
    if True in replays:
        yield "knowing the draws' noise", replays[False], looked_up(replays[False].fitted, most), allowed


def hand_made(model: AcceptanceModel, depth: int) -> AcceptanceModel:
    """Of sources with ranks: short paths and low ranks first, whatever was accepted, as far as they were traced."""
    sources = []
    for one in model.sources:
        if one.slopes:
            paths = depth_template((len(one.ranks),) + (4,) * (depth - 1), len(one.ranks) - 1)
            one = replace(one, template=tuple(path for path in paths if path in one.template))
        sources.append(one)
    return replace(model, sources=tuple(sources))


if __name__ == "__main__":
    main()

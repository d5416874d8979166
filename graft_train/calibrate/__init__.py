"""`calibrate`: learns when to stop drafting and what to verify, from traces and this device's latencies."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from math import hypot
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft_inference import (
    AcceptanceModel,
    ChainPlan,
    GraftEngine,
    GraftError,
    Plan,
    Policy,
    ScoredPlan,
    paper_policy,
)
from graft_inference.bundle import Bundle, check_launch, load_successors
from graft_inference.heads.families import load_any_head, most_steps
from graft_inference.target.model import max_positions
from graft_train.arithmetic import measured_arithmetic, with_dtype
from graft_train.calibrate.budget import Budget
from graft_train.calibrate.latency import Latency, elsewhere
from graft_train.calibrate.measure import load_traces, record_missing, timer_of, told_traces
from graft_train.calibrate.race import Track, distinct, found_of, race, race_of
from graft_train.calibrate.replay import Forecast, Replay, Replays, replay_of
from graft_train.calibrate.report import (
    CONTRADICTS,
    calibration,
    draw_frontier,
    frontier,
    print_report,
    to_markdown,
)
from graft_train.calibrate.search import Allowed, best_eagle3, best_learned, best_paper
from graft_train.calibrate.standings import ERROR, Standings
from graft_train.calibrate.texts import TEXTS, texts_of
from graft_train.calibrate.timer import Pace, RoundTimer
from graft_train.calibrate.traces import Traces
from graft_train.config import Config
from graft_train.config.policy import CalibrateConfig
from graft_train.data.samples import check_room, read_samples
from graft_train.data.target import load_target, load_tokenizer, text_config
from graft_train.device import describe_device
from graft_train.files import only_one, told, write_json, write_text
from graft_train.processes import is_main, say
from graft_train.stage import fingerprints_of, run_stage

PLANS = ("eagle3", "draft_only", "retrieve_only", "paper", "learned")
CHAINS = ("eagle3", "retrieve_only", "chain")
"""Where `graft` is to be a chain: a tree cannot be faster in an engine that verifies none."""
PUBLISHED = ("eagle3", "paper")
"""Told nothing of the draws' noise, as published."""
BY_ALL = ", taught by all nodes"
"""Ends the names of plans as `taught_by_all` changes them."""
TRACED = ("topk", "num_steps", "retrieval_depth", "temperature")
"""Settings that traces are made with."""
INPUTS = ("target", "data", "head", "corpus")
SPECIAL_CASES = ("learned", "eagle3", "draft_only", "retrieve_only", "paper")
"""What the learned policy must not be slower than, the learned plan itself first."""
Speeds = Mapping[str, tuple[bool, float]]
"""By plan: whether it was never dropped, and tokens per second."""


def calibrate(config: Config) -> Path:
    """Writes `policy/`: policy.json, latency.json, traces.safetensors with texts.json, report.json, report.md and
    frontier.png.

    At a temperature there is a second file of traces, of heads and sources that know the noise of the draws.

    Raises:
        GraftError: no or too few calibration prompts, traces of other weights, settings that allow no plan.
    """
    config = with_dtype(config, INPUTS)
    run_dir = Path(config.run_dir)
    settings = config.policy
    if settings.latency_only or settings.latency_from:
        return _renew(config, run_dir / "policy")
    values = {name: value for name, value in asdict(settings).items() if not name.startswith("latency_")}
    values["dtype"] = config.target.dtype
    return run_stage(config, "calibrate", "policy", values, INPUTS, lambda out: _build(config, out))


def learn(settings: CalibrateConfig, replays: Replays) -> dict[str, Plan]:
    """The best plan of each of PLANS, or of CHAINS, by replay."""
    return {name: plan_of(name, settings, replays) for name in (CHAINS if settings.kind == "chain" else PLANS)}


def plan_of(name: str, settings: CalibrateConfig, replays: Replays) -> Plan:
    """The best plan of one of PLANS or CHAINS under these settings."""
    replay = replays[name not in PUBLISHED and True in replays]
    kind = ChainPlan if settings.kind == "chain" else ScoredPlan
    allowed = Allowed(tuple(sorted({*settings.num_draft_tokens})), settings.checkpoints, kind=kind)
    match name:
        case "eagle3":
            return best_eagle3(replay, settings.num_draft_tokens)
        case "paper":
            most = max(max(path) for path in replay.traces.sources["matrix"].template)
            return best_paper(replay, settings.num_draft_tokens, most)
    model = looked_up(replay.fitted, 2 * max(settings.num_draft_tokens))
    if name == "draft_only":
        model = replace(model, sources=())
    if name == "retrieve_only":
        model = replace(model, drafted=())
    return best_learned(replay, model, allowed)


def looked_up(model: AcceptanceModel, most: int) -> AcceptanceModel:
    """The model with the likeliest paths of each source: twice the widest tree, as proposers may say the same."""
    return replace(model, sources=tuple(replace(source, template=source.template[:most]) for source in model.sources))


def _build(config: Config, out: Path) -> None:
    settings, budget = config.policy, Budget(60 * config.policy.minutes)
    prompts = _prompts(config)
    engine = _engine(config)
    made_of = _made_of(config)
    record_missing(settings, engine, prompts, out, made_of)
    traces = load_traces(settings, out, made_of)
    _check_enough(settings, len(traces[False]))
    texts = texts_of(engine, prompts, list(traces.values()), settings.temperature)
    prompts = prompts[: int(traces[False].prompt_T.max()) + 1]
    timer = timer_of(settings, engine, prompts, traces)
    replays = replays_of(settings, traces, timer.latency())
    plans = learn(settings, replays)
    report = _report(settings, engine, traces, timer, replays, plans) if is_main() else {}
    racers = plans | taught_by_all(plans)
    runs_as = distinct(racers)
    forecasts = {name: Forecast.of(replay_of(replays, plan), plan) for name, plan in plans.items()}
    forecasts |= {name: forecasts[name.removesuffix(BY_ALL)] for name in racers}
    pace = Pace(timer)
    track = Track(engine, prompts, settings.max_new_tokens, settings.temperature, pace)
    contestants = {name: racers[name] for name in racers if runs_as[name] == name}
    # Latencies that are not known well foretell badly.
    error = hypot(ERROR, timer.error)
    foretold = {name: forecasts[name].seconds_P for name in contestants}
    standings = race(track, contestants, Standings(foretold, error), budget)
    if not is_main():
        return
    write_json(out / TEXTS, texts)
    found = {name: found_of(standings, runs_as[name], forecasts[name]) for name in racers}
    _write_raced(config, out, timer.latency(), racers, found, report | {"race": race_of(standings, pace)})


def _report(
    settings: CalibrateConfig,
    engine: GraftEngine,
    traces: dict[bool, Traces],
    timer: RoundTimer,
    replays: Replays,
    plans: dict[str, Plan],
) -> dict[str, Any]:
    """What is known before the race."""
    return {
        "device": describe_device(engine.target.device),
        "positions": len(traces[False]),
        "prompts": len(traces[False].prompt_T.unique()),
        "predicted_when_chosen": {name: replay_of(replays, plan).run(plan)[0] for name, plan in plans.items()},
        "calibration_error": calibration(told_traces(traces)),
        "frontier": frontier(settings, replays, plans, plan_of),
        "latency_ms": timer.latency().to_dict(),
        "latency_contradicts": timer.contradicts(),
    }


def _write_raced(
    config: Config,
    out: Path,
    latency: Latency,
    racers: dict[str, Plan],
    found: dict[str, dict[str, Any]],
    report: dict[str, Any],
) -> None:
    """Chooses by what the race found of the racers, and writes everything."""
    names = report["predicted_when_chosen"]
    # Who dropped out is behind those who are left, whatever its few laps say.
    raced = {name: (one["left"], one["weighed"]) for name, one in found.items()}
    faster = {name: _faster(raced, name, f"{name}{BY_ALL}") for name in names}
    plans = {name: racers[racer] for name, racer in faster.items()}
    speeds = {name: raced[racer] for name, racer in faster.items()}
    report |= {
        "graft_is": _fastest(speeds, config.policy.kind),
        "predicted": {
            name: {
                "tokens_per_second": speed / report["race"]["slowness"],
                "acceptance_length": found[name]["acceptance_foretold"],
            }
            for name, speed in names.items()
        },
        "measured": {name: found[racer] for name, racer in faster.items()},
        # A matrix taught by all nodes is raced, not replayed.
        "measured_as_predicted": {name: found[name]["tokens_per_second"] for name in names},
    }
    draw_frontier(report, out / "frontier.png")
    write_text(out / "report.md", to_markdown(report, plans))
    write_json(out / "report.json", report)
    print_report(report, plans)
    _write(config, out, latency, plans, speeds, report)


def taught_by_all(plans: dict[str, Plan]) -> dict[str, Plan]:
    """The plans whose matrix learns from accepted tokens alone, changed so that every verified node teaches it.

    That is the paper's way (Eq. 12). What rejected nodes would have taught is in no trace: only a race can choose.
    """
    return {
        f"{name}{BY_ALL}": replace(plan, learns_accepted=False)
        for name, plan in plans.items()
        if plan.learns_accepted and "matrix" in plan.sources
    }


def _faster(speeds: Speeds, *names: str) -> str:
    """The fastest of those names that were timed."""
    return max((name for name in names if name in speeds), key=speeds.__getitem__)


def _renew(config: Config, directory: Path) -> Path:
    """Chooses anew from the traces that are there, by latencies of this device or of another engine.

    Nothing is traced or raced.
    """
    settings = config.policy
    traces = load_traces(settings, directory, _made_of(config))
    latency, device = _new_latency(config, directory, traces)
    if not is_main():
        return directory
    replays = replays_of(settings, traces, latency)
    plans = learn(settings, replays)
    predicted = {name: replay_of(replays, plan).run(plan)[0] for name, plan in plans.items()}
    speeds = {name: (True, speed) for name, speed in predicted.items()}
    report = {
        "device": device,
        "positions": len(traces[False]),
        "graft_is": _fastest(speeds, settings.kind),
        "predicted": predicted,
    }
    with told(directory), only_one(directory, waits=True):
        _write(config, directory, latency, plans, speeds, report)
    say(
        f"calibrate: {directory} is chosen anew for {device.get('engine', 'this device')}; delete the bundle and run "
        "graft export to ship it (report.md and frontier.png are still of the device that raced)"
    )
    return directory


def _new_latency(config: Config, directory: Path, traces: dict[bool, Traces]) -> tuple[Latency, dict[str, Any]]:
    """A latency table, and what it was measured on."""
    settings = config.policy
    if settings.latency_from:
        return elsewhere(Path(settings.latency_from).resolve(), directory / "latency.json", settings)
    engine = _engine(config)
    timer = timer_of(settings, engine, _prompts(config), traces)
    if timer.contradicts():
        say(CONTRADICTS)
    return timer.latency(), describe_device(engine.target.device)


def _fastest(speeds: Speeds, kind: str) -> str:
    """The plan of a kind; the learned one is never slower than a method it has in it, as far as this device tells."""
    return _faster(speeds, *(SPECIAL_CASES if kind == "learned" else (kind,)))


def replays_of(settings: CalibrateConfig, traces: dict[bool, Traces], latency: Latency) -> Replays:
    """A replay of each file of traces.

    Args:
        traces: by whether the noise of draws is told.
    """
    return {told: Replay(part, latency, max(settings.num_draft_tokens), told) for told, part in traces.items()}


def _write(
    config: Config,
    out: Path,
    latency: Latency,
    plans: dict[str, Plan],
    speeds: Speeds,
    report: dict[str, Any],
) -> None:
    write_json(out / "latency.json", latency.to_dict())
    names = ("device", "positions", "prompts", "graft_is", "predicted", "measured")
    measured_on = {name: report[name] for name in names if name in report} | {"dtype": config.target.dtype}
    arithmetic = measured_arithmetic(Path(config.run_dir))
    if arithmetic:
        measured_on["dtypes_measured"] = arithmetic["measured"]
    policy = Policy(plans[report["graft_is"]], plans["eagle3"], plans["retrieve_only"], measured_on)
    write_json(out / "policy.json", policy.to_dict())


def _made_of(config: Config) -> dict[str, Any]:
    """What the traces depend on: fingerprints and settings."""
    settings = {f"policy.{name}": getattr(config.policy, name) for name in TRACED}
    return fingerprints_of(config, INPUTS) | settings | {"target.dtype": config.target.dtype}


def _prompts(config: Config) -> list[Tensor]:
    settings = config.policy
    path = Path(config.run_dir) / "data" / "samples.jsonl"
    samples = read_samples(path, "calibration")[: settings.prompts]
    if not samples:
        raise GraftError("no calibration prompts: raise data.calibration_share and regenerate")
    _check_enough(settings, len(samples) * (settings.max_new_tokens - 1))
    check_room(samples, settings.max_new_tokens, max_positions(text_config(config.target)), "policy.max_new_tokens")
    return [torch.tensor(sample.prompt_ids) for sample in samples]


def _check_enough(settings: CalibrateConfig, rounds: int) -> None:
    if rounds < settings.least_rounds:
        raise GraftError(
            f"{rounds} traced positions are too few to learn a policy, which takes {settings.least_rounds}: raise "
            "policy.prompts, policy.max_new_tokens or regenerate.held_out"
        )


def _engine(config: Config) -> GraftEngine:
    run_dir = Path(config.run_dir)
    head = load_any_head(run_dir / "head")
    most = most_steps(head.config)
    if most is not None and config.policy.num_steps > most:
        raise GraftError(f"policy.num_steps={config.policy.num_steps}: the head's blocks have {most} drafts: lower it")
    successors = load_successors(run_dir / "corpus" / "successors.safetensors", head.config.vocab_size)
    check_launch(config.target.tp_plan, config.target.device_map)
    target = load_target(config.target, "tp" if config.target.tp_plan else None)
    bundle = Bundle(head, paper_policy(), successors)
    return GraftEngine.from_bundle(bundle, target, tokenizer=load_tokenizer(config.target))

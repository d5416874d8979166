"""Does the learned policy pay? On held-out prompts of two domains, at temperature 0 and 1, in one interleaved run.

    python benchmarks/policy.py --run-dir runs/quickstart

Needs the target, data, head and corpus of a finished quickstart. The first domain is the run's own held-out prompts,
the second prose: licences and documentation texts of the installed packages. Every policy is learned on calibration
prompts and raced on others: the learned one, the same one learned on the other domain (transfer), the paper's settings
(as printed, and with nodes scaled to this device) and the tuned EAGLE-3 tree. Ratios come with 95 % intervals by
bootstrap over prompts. An interrupted run goes on with the temperature it was at. `ablation.py` takes the learned
policy's pieces away.
"""

import argparse
import json
import sysconfig
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from graft_inference import GraftEngine, GraftError, Plan, paper_policy
from graft_inference.bundle import Bundle, load_successors, load_target_model
from graft_inference.heads.eagle3.checkpoint import load_head
from graft_train.calibrate import learn, replays_of, taught_by_all
from graft_train.calibrate.measure import timer_of, told_traces
from graft_train.calibrate.race import Track, distinct, full_race, ratio
from graft_train.calibrate.replay import Replays, replay_of
from graft_train.calibrate.report import calibration, describe
from graft_train.calibrate.timer import Pace
from graft_train.calibrate.traces import Traces, record_traces
from graft_train.config.data import DataConfig
from graft_train.config.policy import CalibrateConfig
from graft_train.data.chat import Chat
from graft_train.data.documents import of_split, read_documents
from graft_train.data.prompts import build_prompts
from graft_train.data.samples import read_samples
from graft_train.device import describe_device
from graft_train.files import write_json

HELD_OUT = ("calibration", "evaluation")
PROSE = (".md", ".rst", ".txt")
BASELINES = ("eagle3", "paper", "paper as printed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-policy"))
    parser.add_argument(
        "--prompts",
        type=int,
        nargs="+",
        default=[24, 12],
        help="of each domain, for calibration and again for the race, at each temperature; what repeats itself, as "
        "greedy text does, differs most from prompt to prompt",
    )
    parser.add_argument("--tokens", type=int, default=80, help="new tokens of each prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    arguments = parser.parse_args()
    if len(arguments.prompts) != len(arguments.temperatures):
        parser.error("--prompts needs one number for each of --temperatures")
    torch.set_num_threads(arguments.threads)
    engine = load_engine(arguments.run_dir)
    settings = CalibrateConfig(
        max_new_tokens=arguments.tokens,
        topk=4,
        num_steps=6,
        num_draft_tokens=[1, 2, 4, 6, 8, 10, 12, 16],
        retrieval_depth=6,
        checkpoints=2,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"device": describe_device(engine.target.device), "runs": []}
    for temperature, count in zip(arguments.temperatures, arguments.prompts, strict=True):
        part = arguments.out / f"temperature-{temperature:g}.json"
        done = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {}
        said = {"prompts": count} | {
            name: str(getattr(arguments, name)) for name in ("run_dir", "tokens", "repeats", "threads")
        }
        if done.get("arguments") != said:  # not an interrupted run's
            domains = {
                "own": own_prompts(arguments.run_dir, count),
                "prose": prose_prompts(arguments.run_dir / "target", count),
            }
            runs = measure(engine, settings, domains, temperature, arguments.repeats)
            done = {"arguments": said, "runs": runs}
            write_json(part, done)
        result["runs"] += done["runs"]
    write_json(arguments.out / "policy.json", result)
    report = to_markdown(result)
    (arguments.out / "policy.md").write_text(report, encoding="utf-8")
    print(report)


def load_engine(run_dir: Path) -> GraftEngine:
    model, _ = load_target_model(run_dir / "target", "cpu", "float32")
    head = load_head(run_dir / "head")
    successors = load_successors(run_dir / "corpus" / "successors.safetensors", head.config.vocab_size)
    return GraftEngine.from_bundle(Bundle(head, paper_policy(), successors), model)


def own_prompts(run_dir: Path, count: int) -> dict[str, list[Tensor]]:
    """The run's calibration and evaluation prompts; nothing was trained on either.

    Raises:
        GraftError: there are fewer.
    """
    found = {}
    for split in HELD_OUT:
        samples = read_samples(run_dir / "data" / "samples.jsonl", split)[:count]
        if len(samples) < count:
            raise GraftError(f"{run_dir} holds out {len(samples)} prompts for {split}: lower --prompts")
        found[split] = [torch.tensor(sample.prompt_ids) for sample in samples]
    return found


def prose_prompts(target: Path, count: int) -> dict[str, list[Tensor]]:
    """Prompts from licences and documentation in site-packages, each document wholly in one split."""
    texts: dict[str, dict[str, str]] = {}
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*")):
        wanted = path.suffix in PROSE or "LICENSE" in path.name.upper() or path.name == "METADATA"
        if wanted and path.suffix in (*PROSE, "") and path.is_file() and 2_000 < path.stat().st_size < 200_000:
            text = path.read_text(encoding="utf-8", errors="ignore")
            texts.setdefault(text[:500], {"id": str(path), "text": text})  # many packages carry one licence
    if len(texts) < 20:
        raise GraftError("site-packages holds too little prose: install the packages of constraints.txt")
    # Documents read their text when it is asked for: the file stays until the prompts are made.
    with tempfile.TemporaryDirectory() as directory:
        records = Path(directory) / "prose.jsonl"
        records.write_text("".join(json.dumps(record) + "\n" for record in texts.values()), encoding="utf-8")
        config = DataConfig(path=str(records), prompt_tokens=48, calibration_share=0.45, evaluation_share=0.45)
        chat, documents = Chat(AutoTokenizer.from_pretrained(target), set()), read_documents(config)
        found = {}
        for split in HELD_OUT:
            mine = of_split(documents, split, config)
            prompts = build_prompts(mine, chat, config, count=count, max_tokens=48, seed=0)
            found[split] = [torch.tensor(prompt.ids) for prompt in prompts]
        return found


def measure(
    engine: GraftEngine,
    settings: CalibrateConfig,
    domains: dict[str, dict[str, list[Tensor]]],
    temperature: float,
    repeats: int,
) -> list[dict[str, Any]]:
    """Learns on each domain's calibration prompts, races on each domain's evaluation prompts."""
    settings = replace(settings, temperature=temperature)
    learned = {name: learn_on(engine, settings, prompts["calibration"], repeats) for name, prompts in domains.items()}
    found = []
    for name, one in learned.items():
        plans = contenders(settings, learned, name)
        track = track_of(engine, settings, domains[name]["evaluation"], redraws=True)
        raced = race_distinct(track, plans, repeats)
        found.append(
            {
                "domain": name,
                "temperature": temperature,
                "plans": {plan: describe(plans[plan]) for plan in plans},
                "measured": raced,
                "ratios": {base: {plan: ratio(raced[plan], raced[base]) for plan in plans} for base in BASELINES},
                "predicted": {kind: speed / one.slowness for kind, speed in one.predicted.items()},
                "predicted_when_chosen": one.predicted,
                "measured_on_calibration": one.tokens_per_second,
                "calibration_error": calibration(told_traces(one.traces)),
                "latency_ms": one.replays[False].latency.to_dict(),
            }
        )
    return found


@dataclass
class Learned:
    """What one domain's calibration prompts gave.

    Attributes:
        traces: by whether the noise of draws is told.
        replays: with the latencies that the plans were chosen by.
        predicted: tokens per second of the plans by these latencies.
        slowness: what the device took while the plans raced, over these latencies.
        tokens_per_second: of the plans, on these same prompts.
    """

    traces: dict[bool, Traces]
    replays: Replays
    plans: dict[str, Plan]
    predicted: dict[str, float]
    slowness: float
    tokens_per_second: dict[str, float]


def learn_on(engine: GraftEngine, settings: CalibrateConfig, prompts: list[Tensor], repeats: int) -> Learned:
    """The plans, and how slow the device is while they race: a shared machine has another speed minutes later."""
    noises = (False, True) if settings.temperature else (False,)
    traces = {told: record_traces(engine, prompts, settings, told) for told in noises}
    timer = timer_of(settings, engine, prompts, traces)
    replays = replays_of(settings, traces, timer.latency())
    plans = learn(settings, replays)
    predicted = {name: replay_of(replays, plan).run(plan)[0] for name, plan in plans.items()}
    pace = Pace(timer)
    raced = race_distinct(track_of(engine, settings, prompts, pace), plans, repeats)
    speeds = {name: found["tokens_per_second"] for name, found in raced.items()}
    return Learned(traces, replays, plans, predicted, pace.factor, speeds)


def track_of(
    engine: GraftEngine,
    settings: CalibrateConfig,
    prompts: list[Tensor],
    pace: Pace | None = None,
    redraws: bool = False,
) -> Track:
    return Track(engine, prompts, settings.max_new_tokens, settings.temperature, pace, redraws)


def race_distinct(track: Track, plans: dict[str, Plan], repeats: int) -> dict[str, dict[str, Any]]:
    """Plans that came out equal are raced once, under the first one's name."""
    runs_as = distinct(plans)
    raced = full_race(track, {name: plan for name, plan in plans.items() if runs_as[name] == name}, repeats)
    return {name: raced[runs_as[name]] for name in plans}


def contenders(settings: CalibrateConfig, learned: dict[str, Learned], domain: str) -> dict[str, Plan]:
    """The plans of one race by name."""
    plans = dict(learned[domain].plans)
    plans["paper as printed"] = paper_policy().graft
    for other in learned:
        if other != domain:
            plans[f"learned on {other}"] = learned[other].plans["learned"]
    if settings.temperature:
        plans["eagle3, told the noise"] = replace(plans["eagle3"], shares_noise=True)
    return plans | taught_by_all({"learned": plans["learned"]})


def to_markdown(result: dict[str, Any]) -> str:
    device = result["device"]
    lines = ["# The learned policy", "", f"{device['name']}, {device['threads']} threads, torch {device['torch']}.", ""]
    for run in result["runs"]:
        prompts = len(run["measured"]["learned"]["tokens"])
        lines += [
            f"## {run['domain']}, temperature {run['temperature']:g}, {prompts} prompts",
            "",
            "| plan | steps: nodes | tokens/s | acceptance | over eagle3 | over paper, scaled | over paper, printed |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        by_speed = sorted(run["measured"].items(), key=lambda item: -item[1]["tokens_per_second"])
        for name, found in by_speed:
            ratios = (run["ratios"][base][name] for base in BASELINES)
            cells = " | ".join(f"{middle:.2f} ({low:.2f}-{high:.2f})" for middle, low, high in ratios)
            speed = f"{found['tokens_per_second']:.0f} | {found['acceptance_length']:.2f}"
            lines.append(f"| {name} | {run['plans'][name]} | {speed} | {cells} |")
        lines += [
            "",
            "Tokens/s on the calibration prompts, predicted by the latency table and the device's pace in the race, "
            "and measured:",
            "",
        ]
        for name, predicted in run["predicted"].items():
            measured, before = run["measured_on_calibration"][name], run["predicted_when_chosen"][name]
            error = f"{predicted / measured - 1:+.1%}; when chosen {before:.0f}"
            lines.append(f"- {name}: {predicted:.0f} against {measured:.0f} ({error})")
        for source, error in run["calibration_error"].items():
            if error:
                lines.append(f"- calibration error, {source}: {error['before']:.2%} -> {error['after']:.2%}")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

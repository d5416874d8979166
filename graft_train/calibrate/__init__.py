"""`calibrate`: chooses when to stop drafting and what to verify, from traces and this device's latencies."""

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from graft_inference import GraftEngine, GraftError, Plan, Policy, paper_policy
from graft_inference.bundle import Bundle, load_successors
from graft_inference.head_checkpoint import load_head
from graft_train.calibrate.latency import measure_latency
from graft_train.calibrate.search import Replay, best_eagle3, best_graft, best_retrieve
from graft_train.calibrate.traces import record_traces
from graft_train.data.samples import read_samples
from graft_train.data.target import load_target, target_path
from graft_train.device import describe_device
from graft_train.stage import run_stage, write_json

if TYPE_CHECKING:
    from graft_train.config import Config


def calibrate(config: "Config") -> Path:
    """Writes `policy/`: policy.json, traces.safetensors and latency.json.

    Raises:
        GraftError: no calibration prompts, or settings that allow no plan.
    """
    run_dir = Path(config.run_dir)
    inputs = [target_path(config), run_dir / "data", run_dir / "head", run_dir / "corpus"]
    return run_stage(
        config, "calibrate", "policy", asdict(config.policy), inputs, lambda out: _build(config, run_dir, out)
    )


def _build(config: "Config", run_dir: Path, out: Path) -> None:
    settings = config.policy
    samples = read_samples(run_dir / "data" / "samples.jsonl", "calibration")[: settings.prompts]
    if not samples:
        raise GraftError("no calibration prompts: raise data.calibration_share and regenerate")
    prompts = [torch.tensor(sample.prompt_ids) for sample in samples]
    model = load_target(config)
    head = load_head(run_dir / "head")
    successors = load_successors(run_dir / "corpus" / "successors.safetensors", head.config.vocab_size)
    engine = GraftEngine.from_bundle(Bundle(head, paper_policy(), successors), model)

    traces = record_traces(
        engine,
        prompts,
        settings.max_new_tokens,
        settings.beam_width,
        settings.max_passes,
        settings.retrieval_depth,
    )
    traces.save(out / "traces.safetensors")
    latency = measure_latency(
        engine, prompts, settings.widths, settings.beam_width, settings.max_passes, settings.repeats
    )
    write_json(out / "latency.json", latency.to_dict())

    replay = Replay(traces, latency, settings.widths, settings.beam_width)
    finalists = {
        "eagle3": best_eagle3(replay),
        "retrieve": best_retrieve(replay),
        "graft": best_graft(replay, settings.checkpoints),
    }
    measured = _race(engine, prompts, finalists, settings.max_new_tokens, settings.repeats)
    chosen = max(measured, key=lambda name: measured[name]["tokens_per_second"])
    predicted = {
        name: dict(zip(("tokens_per_second", "tau"), replay.run(plan), strict=True)) for name, plan in finalists.items()
    }
    _print(finalists, predicted, measured)
    policy = Policy(
        graft=finalists[chosen],
        eagle3=finalists["eagle3"],
        retrieve=finalists["retrieve"],
        measured_on={
            "device": describe_device(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "prompts": len(prompts),
            "positions": len(traces.prompt_T),
            "latency_ms": latency.to_dict(),
            "predicted": predicted,
            "measured": measured,
            # The plan found for graft, unless one that it contains as a special case measured faster.
            "graft_is": chosen,
        },
    )
    write_json(out / "policy.json", policy.to_dict())


def _race(
    engine: GraftEngine,
    prompts: list[torch.Tensor],
    plans: dict[str, Plan],
    max_new_tokens: int,
    repeats: int,
) -> dict[str, dict[str, Any]]:
    """Real tokens per second of each plan, interleaved over the prompts; medians over repeats."""
    speeds: dict[str, list[float]] = {name: [] for name in plans}
    taus: dict[str, float] = {}
    for repeat in range(repeats):
        tokens, seconds, rounds = (dict.fromkeys(plans, 0.0) for _ in range(3))
        for index, prompt in enumerate(prompts):
            order = list(plans) if (index + repeat) % 2 else list(reversed(plans))
            for name in order:
                stats = engine.generate(prompt, max_new_tokens, plan=plans[name]).stats
                tokens[name] += stats.emitted - 1
                seconds[name] += stats.decode_seconds
                rounds[name] += stats.rounds
        for name in plans:
            speeds[name].append(tokens[name] / seconds[name])
            taus[name] = tokens[name] / rounds[name]
    return {name: {"tokens_per_second": median(speeds[name]), "tau": taus[name]} for name in plans}


def _print(plans: dict[str, Plan], predicted: dict[str, Any], measured: dict[str, Any]) -> None:
    table = Table(title="calibrated plans (calibration prompts)")
    for column in (
        "plan",
        "stages: passes (stop at confidence) drafted+retrieved",
        "tokens/s predicted",
        "measured",
        "tau",
    ):
        table.add_column(column, justify="left" if column.startswith(("plan", "stages")) else "right")
    for name, plan in plans.items():
        stages = ", ".join(
            f"{stage.passes}"
            + (f" (<= {stage.threshold:.2f})" if stage is not plan.stages[-1] else "")
            + f" {stage.drafted}+{stage.retrieved}"
            for stage in plan.stages
        )
        table.add_row(
            name,
            stages,
            f"{predicted[name]['tokens_per_second']:.0f}",
            f"{measured[name]['tokens_per_second']:.0f}",
            f"{measured[name]['tau']:.2f}",
        )
    Console().print(table)

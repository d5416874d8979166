"""Heads of two runs on one target, calibrated alike and timed in turns on held-out prompts.

    python benchmarks/heads.py --runs runs/quickstart runs/quickstart-block

The first run's target, data and corpus serve all; of the others only `head/` is read. Of each head: the chain that
engines verify, what papers make of such a head (`published`), and the learned plan with all sources. Every output is
compared. Before they are timed, the same plans are computed for a target so large that a pass of it costs LARGE passes
of the head, from the acceptance in the traces.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from graft_inference import GraftEngine, Plan, QuotaCheckpoint, QuotaPlan, paper_policy
from graft_inference.bundle import Bundle, load_successors
from graft_inference.heads.block.config import BlockHeadConfig
from graft_inference.heads.families import HeadConfig, load_any_head, most_steps
from graft_inference.policy.plan import AUTOREGRESSIVE
from graft_train.calibrate import learn, replays_of
from graft_train.calibrate.measure import timer_of
from graft_train.calibrate.race import ratio
from graft_train.calibrate.replay import Replays, replay_of
from graft_train.calibrate.report import describe
from graft_train.calibrate.traces import record_traces
from graft_train.config.policy import CalibrateConfig
from graft_train.data.samples import read_samples

LARGE = 20.0
Contestants = dict[str, tuple[GraftEngine, Plan]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    first = arguments.runs[0]
    model = AutoModelForCausalLM.from_pretrained(first / "target", dtype=torch.float32).eval().requires_grad_(False)
    contestants: Contestants = {}
    for run in arguments.runs:
        contestants |= dict(contestants_of(run, first, model))
    engine = next(iter(contestants.values()))[0]
    contestants = {"autoregressive": (engine, AUTOREGRESSIVE)} | contestants
    report(measured(contestants, prompts_of(first, "evaluation", arguments.prompts), arguments.tokens))


def prompts_of(run: Path, split: str, count: int) -> list[Tensor]:
    samples = read_samples(run / "data" / "samples.jsonl", split)[:count]
    return [torch.tensor(sample.prompt_ids) for sample in samples]


def contestants_of(run: Path, first: Path, model: torch.nn.Module) -> Iterator[tuple[str, tuple[GraftEngine, Plan]]]:
    """Plans of one head, by name, with its engine."""
    head = load_any_head(run / "head")
    steps = most_steps(head.config) or 4
    matrix = load_successors(first / "corpus" / "successors.safetensors", head.config.vocab_size)
    bundle = Bundle(head, paper_policy(4, 12, steps, matrix.k - 1), matrix)
    engine = GraftEngine.from_bundle(bundle, model, check=False, fallback=False)
    settings = CalibrateConfig(
        topk=4, num_steps=steps, num_draft_tokens=[1, 2, 4, 8, 12], retrieval_depth=5, checkpoints=1, max_new_tokens=48
    )
    prompts = prompts_of(first, "calibration", 8)
    traces = {False: record_traces(engine, prompts, settings)}
    latency = timer_of(settings, engine, prompts, traces).latency()
    plans = learn(settings, replays_of(settings, traces, latency))
    compute_for_a_large_target(run.name, head.config, settings, replays_of(settings, traces, latency))
    print(f"{run}: draft_ms {[round(time, 2) for time in latency.draft_ms]}", flush=True)
    chain = QuotaPlan((QuotaCheckpoint(steps, drafted=steps),), 1)
    for name, plan in {"chain": chain, **published(head.config, plans), "learned": plans["learned"]}.items():
        print(f"{run} {name}: {describe(plan)}", flush=True)
        yield f"{run.name} {name}", (engine, plan)


def compute_for_a_large_target(name: str, head: HeadConfig, settings: CalibrateConfig, replays: Replays) -> None:
    """Prints what would be gained, by replay, where the target's pass takes as long for all widths of a tree."""
    is_block = isinstance(head, BlockHeadConfig)
    draft_ms = [0.0] + [1.0 if is_block else float(step) for step in range(1, settings.num_steps + 1)]
    for_all = dict.fromkeys(("build_ms", "commit_ms", "read_ms"), 0.0)
    for replay in replays.values():
        known = replay.latency
        free = dict.fromkeys(known.source_ms, 0.0)
        verify_ms = [[LARGE] * len(known.num_draft_tokens)] * len(known.contexts)
        replay.latency = replace(known, verify_ms=verify_ms, draft_ms=draft_ms, source_ms=free, **for_all)
    for plan_name, plan in learn(settings, replays).items():
        speed, length = replay_of(replays, plan).run(plan)
        print(f"{name} {plan_name}, computed for a large target: {speed * LARGE / 1e3:.2f}x, acceptance {length:.2f}")


def published(head: HeadConfig, plans: dict[str, Plan]) -> dict[str, Plan]:
    """The plans of papers that such a head has, by their names; docs/benchmarks/heads.md says what each is.

    Args:
        plans: of `learn`.
    """
    tuned = plans["eagle3"]
    if not isinstance(head, BlockHeadConfig):
        return {"tree": tuned}
    # As many paths go on at every depth as the tree has nodes: none of the best is missed.
    nodes = tuned.num_draft_tokens - 1
    best = QuotaPlan((QuotaCheckpoint(tuned.num_steps, drafted=nodes),), topk=nodes)
    if head.markov_rank:
        return {"DARTree": best}
    return {"DDTree": best, "CaDDTree": plans["draft_only"], "Graft-DFlash": plans["paper"]}


def measured(contestants: Contestants, prompts: list[Tensor], tokens: int) -> dict[str, dict[str, list[float]]]:
    """Tokens, seconds and rounds of every prompt; the order turns from prompt to prompt."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"tokens": [], "seconds": [], "rounds": []} for name in contestants
    }
    for engine, plan in contestants.values():
        engine.generate(prompts[0], 16, plan=plan)  # warms up
    for number, prompt in enumerate(prompts):
        names = list(contestants)
        names = names[number % len(names) :] + names[: number % len(names)]
        texts = set()
        for name in names if number % 2 else reversed(names):
            engine, plan = contestants[name]
            out = engine.generate(prompt, tokens, plan=plan)
            texts.add(tuple(out.sequences[0].tolist()))
            found[name]["tokens"].append(out.stats.emitted - 1)
            found[name]["seconds"].append(out.stats.decode_seconds)
            found[name]["rounds"].append(out.stats.rounds)
        assert len(texts) == 1, f"prompt {number}: the outputs differ"
    return found


def report(found: dict[str, dict[str, list[float]]]) -> None:
    print("| | tokens/s | over autoregressive (95 %) | acceptance |\n|---|---:|---:|---:|")
    for name, one in found.items():
        middle, low, high = ratio(one, found["autoregressive"])
        speed, length = sum(one["tokens"]) / sum(one["seconds"]), sum(one["tokens"]) / sum(one["rounds"])
        print(f"| {name} | {speed:.1f} | {middle:.2f}x ({low:.2f}-{high:.2f}) | {length:.2f} |")


if __name__ == "__main__":
    main()

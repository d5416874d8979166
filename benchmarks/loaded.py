"""Does calibration choose the same plan on a machine that other work slows down by half?

    python benchmarks/loaded.py

Needs nothing: the pair is a random Llama, whose greedy text goes in circles and now and then leaves them, and a random
head. It is traced once, and its latency table is measured once by itself, at length. Then processes that only compute
take half of every core, and ten calibrations measure the table anew, within their minutes, and choose a plan each. What
a plan is worth is its replay by the table that was measured at length. "Before" is the table as it was until this was
written: the median of each plan's samples, from the same first samples, not measured again.
"""

import argparse
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from graft_inference import GraftEngine, Plan, paper_policy
from graft_inference.heads.eagle3.model import DraftHead, DraftHeadConfig
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.target.model import Target
from graft_train.calibrate import plan_of, replays_of
from graft_train.calibrate import timer as timer_module
from graft_train.calibrate.budget import TABLE, Budget
from graft_train.calibrate.latency import Latency
from graft_train.calibrate.measure import timer_of
from graft_train.calibrate.replay import Replay
from graft_train.calibrate.report import describe
from graft_train.calibrate.rounds import Round, Sample
from graft_train.calibrate.timer import RoundTimer
from graft_train.calibrate.traces import record_traces
from graft_train.config.policy import CalibrateConfig
from graft_train.device import describe_device

CALIBRATIONS, WITHIN = 10, 0.03
VOCAB, HIDDEN, LAYERS = 128, 256, 4
NOISE = 30.0
"""Of what the layers add to the embeddings: without it every token had one successor, and text went in circles."""
CIRCLE, KNOWN = 8, 0.6
"""Tokens of a circle, and the share of successors that the matrix knows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=0.2, help="of each calibration; a fifth is the table's")
    parser.add_argument("--alone-minutes", type=float, default=2.0, help="the same, of the table measured at length")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    engine, prompts = pair()
    settings = CalibrateConfig(
        max_new_tokens=48, topk=2, num_steps=2, num_draft_tokens=[1, 2, 4, 8, 16, 32], retrieval_depth=4, checkpoints=1,
        minutes=arguments.minutes, least_rounds=50,
    )  # fmt: skip
    traces = {False: record_traces(engine, prompts, settings)}
    alone = timer_of(replace(settings, minutes=arguments.alone_minutes), engine, prompts, traces).latency()
    judge = replays_of(settings, traces, alone)
    best = plan_of("learned", settings, judge)
    print(f"{describe_device(engine.target.device)}; load {os.getloadavg()[0]:.1f} before any load of ours")
    print(f"alone, ms by rows: {shown(alone)}\nbest: {describe(best)}, {judge[False].run(best)[0]:.0f} tokens/s\n")
    print("| | verify, ms by rows | sweeps | plan | behind the best | before: behind | before: rows of one value |")
    print("|---:|---|---:|---|---:|---:|---:|")
    behind: dict[str, list[float]] = {"now": [], "before": []}
    chosen: list[Plan] = []
    for number in range(CALIBRATIONS):
        with slowed():
            timer = Watched.of(settings, engine, prompts, traces)
        plans = {
            "now": plan_of("learned", settings, replays_of(settings, traces, timer.latency())),
            "before": plan_of("learned", settings, replays_of(settings, traces, timer.before)),
        }
        for name, plan in plans.items():
            behind[name].append(1 - speed(judge[False], plan) / speed(judge[False], best))
        chosen.append(plans["now"])
        print(
            f"| {number} | {shown(timer.latency())} | {timer.sweeps} | {describe(plans['now'])} | "
            f"{behind['now'][-1]:.1%} | {behind['before'][-1]:.1%} | {evened_out(timer.before)} |",
            flush=True,
        )
    most = max(set(chosen), key=chosen.count)
    print(
        f"\nwithin {WITHIN:.0%} of the best: {count(behind['now'])} of {CALIBRATIONS}, before {count(behind['before'])}"
    )
    print(f"the plan that was chosen most often, thresholds included: {chosen.count(most)} of {CALIBRATIONS}")
    print(f"load {os.getloadavg()[0]:.1f} in the end")


class Watched(RoundTimer):
    """Keeps the table that would have been taken before."""

    before: Latency

    @classmethod
    def of(cls, settings: CalibrateConfig, engine: GraftEngine, prompts: list[Tensor], traces: Any) -> "Watched":
        told, most = traces[False], 2 * max(settings.num_draft_tokens)
        templates = {name: source.template[:most] for name, source in told.sources.items()}
        longest = int(told.context_T.max()) + 1
        timer = cls(
            engine, prompts, settings.num_draft_tokens, settings.topk, settings.num_steps, 0.0, templates, longest
        )
        timer.measure(Budget(60 * TABLE * settings.minutes))
        return timer

    def fill(self, budget: Budget, least: int = 1) -> None:
        super().fill(budget, least)
        if least == 1:
            kept, undisturbed = self.samples, timer_module.undisturbed
            self.samples = {run: [[mean(one)] for one in found] for run, found in kept.items()}
            timer_module.undisturbed = lambda samples, phase: median(one[phase] for [one] in samples)
            self.before = self.latency()
            self.samples, timer_module.undisturbed = kept, undisturbed


def mean(sample: Sample) -> Round:
    return {phase: float(np.mean([one[phase] for one in sample])) for phase in sample[0]}


def pair() -> tuple[GraftEngine, list[Tensor]]:
    """The engine, and prompts that the target has drawn."""
    torch.manual_seed(0)
    shape = {"hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_attention_heads": 4}
    config = LlamaConfig(
        **shape, vocab_size=VOCAB, num_hidden_layers=LAYERS, num_key_value_heads=4, bos_token_id=None, eos_token_id=None
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    tokens_V = torch.arange(VOCAB)
    next_V = tokens_V - tokens_V % CIRCLE + (tokens_V + 1) % CIRCLE
    embedding_VH = torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.lm_head.weight[next_V] = embedding_VH
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(NOISE)
        layer.mlp.down_proj.weight.mul_(NOISE)
    head = DraftHead(
        DraftHeadConfig(
            **shape,
            num_key_value_heads=4,
            head_dim=HIDDEN // 4,
            vocab_size=VOCAB,
            draft_vocab_size=VOCAB // 4,
            aux_layer_ids=(0, 1, 2),
            max_position_embeddings=2048,
        )
    )
    head.set_draft_vocabulary(torch.arange(VOCAB // 4))
    ids_VK = torch.randint(VOCAB, (VOCAB, 4), dtype=torch.int32)
    ids_VK[:, 0] = torch.where(torch.rand(VOCAB) < KNOWN, next_V, ids_VK[:, 0])
    matrix = SuccessorMatrix(ids_VK, torch.full((VOCAB, 4), 0.25, dtype=torch.float16))
    target = Target(model, head.config.aux_layer_ids)
    engine = GraftEngine(target, paper_policy(2, 8, 2, 3), head.eval().requires_grad_(False), matrix)
    prompts = [torch.randint(VOCAB, (24,)) for _ in range(4)]
    drawn = [engine.generate(one, 40, 1.0, "autoregressive", seed) for seed, one in enumerate(prompts)]
    return engine, [one.sequences[0] for one in drawn]


@contextmanager
def slowed() -> Iterator[None]:
    """While the block runs, a process for each core computes without end, as urgent as this one."""
    burners = [multiprocessing.Process(target=burn, daemon=True) for _ in range(os.cpu_count() or 1)]
    for one in burners:
        one.start()
    try:
        yield
    finally:
        for one in burners:
            one.kill()
            one.join()


def burn() -> None:
    torch.set_num_threads(1)
    square = torch.rand(256, 256)
    while True:
        square @ square


def speed(judge: Replay, plan: Plan) -> float:
    return judge.run(plan)[0]


def count(behind: list[float]) -> int:
    return sum(one <= WITHIN for one in behind)


def shown(table: Latency) -> str:
    return " ".join(f"{time:.2f}" for time in table.verify_ms[0])


def evened_out(table: Latency) -> int:
    """Rows of one and the same time."""
    return max(times.count(time) for times in table.verify_ms for time in times)


if __name__ == "__main__":
    main()

"""How many rows of a tree pay on a dense target and on a mixture of experts, each as measured, at the same acceptance.

    python benchmarks/width.py --run runs/quickstart

More rows wake more experts, so that a wider pass costs a mixture more than it costs a dense target. `calibrate` chooses
tree sizes from the device's own curve, whatever the target. Here a trained pair's traces say what is accepted, and two
targets of random weights, in which a token passes through equally many parameters, what it costs.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from policy import load_engine, own_prompts
from rich.console import Console
from rich.table import Table
from round import with_random_head
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from graft_inference import Plan
from graft_train.calibrate import plan_of, replays_of
from graft_train.calibrate.measure import timer_of
from graft_train.calibrate.replay import Replay, replay_of
from graft_train.calibrate.report import describe
from graft_train.calibrate.traces import record_traces
from graft_train.config.policy import CalibrateConfig
from graft_train.device import describe_device

LAYERS, HIDDEN, EXPERT, ACTIVE = 8, 512, 1024, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trained = load_engine(arguments.run)
    settings = CalibrateConfig(
        max_new_tokens=64, topk=4, num_steps=6, num_draft_tokens=[1, 2, 4, 6, 8, 12, 16, 24, 32], retrieval_depth=6,
        checkpoints=2,
    )  # fmt: skip
    prompts = own_prompts(arguments.run, arguments.prompts)["calibration"]
    traces = {False: record_traces(trained, prompts, settings)}
    device = describe_device(trained.target.device)
    table = Table(title=f"{device['name']}, {device['threads']} threads, {arguments.experts} experts, {ACTIVE} a token")
    for name in ("target", "rows", "pass, ms", "plan", "steps: nodes", "over plain decoding"):
        table.add_column(name, justify="left" if name in ("target", "plan", "steps: nodes") else "right")
    for name, model in targets(trained.target.config.vocab_size, arguments.experts).items():
        latency = timer_of(settings, with_random_head(model), prompts, traces).latency()
        for rows, milliseconds in zip(latency.num_draft_tokens, latency.verify_ms[0], strict=True):
            table.add_row(name, str(rows), f"{milliseconds:.1f}")
        replays = replays_of(settings, traces, latency)
        plain = latency.verify_ms[0][0] + latency.build_ms + latency.commit_ms
        for kind in ("eagle3", "learned"):
            plan = plan_of(kind, settings, replays)
            replay = replay_of(replays, plan)
            gain = f"{replay.run(plan)[0] * plain / 1e3:.2f}x"
            table.add_row(name, f"{mean_rows(replay, plan):.1f}", "", kind, describe(plan), gain)
        table.add_section()
    Console(width=140).print(table)


def targets(vocab_size: int, experts: int) -> dict[str, Any]:
    """Of random weights; a token passes through equally many of them."""
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    sizes = {
        "vocab_size": vocab_size, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
        "num_key_value_heads": 8, "head_dim": HIDDEN // 8, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**sizes, **ends, intermediate_size=ACTIVE * EXPERT))
    mixture = MixtralForCausalLM(
        MixtralConfig(
            **sizes,
            **ends,
            intermediate_size=EXPERT,
            num_local_experts=experts,
            num_experts_per_tok=ACTIVE,
            sliding_window=None,
        )
    )
    return {name: model.eval().requires_grad_(False) for name, model in (("dense", dense), ("experts", mixture))}


def mean_rows(replay: Replay, plan: Plan) -> float:
    """Rows of a round on average."""
    outcome = replay.outcome(plan)
    rows = [checkpoint.num_draft_tokens for checkpoint in plan.checkpoints]
    rows_T = torch.tensor(rows)[torch.from_numpy(outcome.checkpoint_T)]
    return float(rows_T[torch.from_numpy(replay.visits(outcome))].float().mean())


if __name__ == "__main__":
    main()

"""Do captured rounds emit what eager rounds emit, on a target of random weights and a real size?

    python benchmarks/equality.py --shape 1b --device cuda

In fp32, without TF32, under forced plans and the paper's, greedy and sampling: tokens, rounds and checkpoints must be
the same. Without CUDA, recorded operators (tests/graft_inference/recorded.py) stand in for graphs, to see that it runs.
Exits with 1 if anything differs or a round was not captured.
"""

import argparse
import sys

import torch
from round import NUM_DRAFT_TOKENS, SHAPES, TOPK, forced_plans, random_pair

from graft_inference import GraftEngine, Plan
from graft_inference.decode.captured import CapturedRounds
from graft_train.device import describe_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("highest")  # reduced precision would part the two on near ties
    engine = random_pair(arguments.shape, arguments.device, torch.float32)
    if engine.captured is None:
        from tests.graft_inference.recorded import RecordedGraphs

        engine.captured = CapturedRounds(engine.target, engine.speculator, RecordedGraphs())
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(engine.target.config.vocab_size, (64,), generator=generator)
    plans = forced_plans(TOPK, NUM_DRAFT_TOKENS) | {"paper": engine.policy.plan("graft")}
    print(f"{describe_device(engine.target.device)}, {arguments.shape}, fp32\n")
    print("| plan | temperature | rounds | captured | same |\n|---|---:|---:|---:|---|")
    same = True
    for name, plan in plans.items():
        for temperature in (0.0, 1.0):
            rounds, captured, problem = compare(engine, plan, prompt, arguments.tokens, temperature)
            print(f"| {name} | {temperature:g} | {rounds} | {captured} | {problem or 'yes'} |", flush=True)
            same &= not problem
    sys.exit(not same)


def compare(
    engine: GraftEngine, plan: Plan, prompt: torch.Tensor, tokens: int, temperature: float
) -> tuple[int, int, str]:
    """Rounds, those that were captured, and what differs, if anything does."""
    graphs, outs = engine.captured, []
    for engine.captured in (None, graphs):
        outs.append(engine.generate(prompt, tokens, temperature, plan=plan, seed=0))
    eager, captured = outs
    differs = [
        name for name in ("rounds", "checkpoints") if getattr(eager.stats, name) != getattr(captured.stats, name)
    ]
    if eager.sequences.tolist() != captured.sequences.tolist():
        same = int((eager.sequences == captured.sequences).cumprod(dim=1).sum()) - len(prompt)
        differs.append(f"tokens from {same} on")
    problem = ", ".join(differs)
    if captured.stats.captured != captured.stats.rounds:
        problem += f" not captured: {captured.stats.uncaptured}"
    return captured.stats.rounds, captured.stats.captured, problem


if __name__ == "__main__":
    main()

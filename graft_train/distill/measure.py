"""The acceptance length that the head reaches in the engine that will serve it."""

import torch
from accelerate import Accelerator
from torch import Tensor

from graft_inference import GraftEngine
from graft_inference.policy.plan import Plan
from graft_inference.policy.policy import Policy
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.target.model import Target
from graft_train.distill.batches import TokenSample
from graft_train.distill.strategy import Strategy


def held_out_prompts(target: Target, samples: list[TokenSample], count: int, tokens: int) -> list[Tensor]:
    """The prompts of the first samples that leave room for `tokens` more."""
    limit = target.max_positions - tokens
    prompts = [sample.tokens_S[: int(sample.loss_mask_S.nonzero()[0])] for sample in samples]
    return [prompt for prompt in prompts if 0 < len(prompt) <= limit][:count]


def measure_acceptance(
    accelerator: Accelerator, strategy: Strategy, plan: Plan, prompts: list[Tensor], tokens: int
) -> float:
    """Decodes the prompts greedily with this plan, shared out over the processes; a target that is shared out
    itself decodes all of them on each.

    Returns:
        Tokens per target pass, the bonus token included, over all prompts.
    """
    target = strategy.target
    served = strategy.served_head().to(device=target.model.device, dtype=target.model.dtype).eval()
    engine_target = Target(target.model, target.aux_layer_ids)
    nothing = SuccessorMatrix(torch.full((1, 1), -1, device=target.model.device))
    engine = GraftEngine(engine_target, Policy(plan, plan, plan), served, nothing)
    sums = torch.zeros(2, device=accelerator.device)
    mine = prompts if target.is_shared else prompts[accelerator.process_index :: accelerator.num_processes]
    try:
        for prompt_S in mine:
            stats = engine.generate(prompt_S, tokens, method="eagle3").stats
            sums += torch.tensor([stats.emitted - 1, stats.rounds], device=sums.device)
    finally:
        engine_target.release()
    emitted, rounds = accelerator.reduce(sums, "sum").tolist()
    return emitted / max(1, rounds)

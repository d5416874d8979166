"""The acceptance length that the head reaches in the engine that will serve it."""

import torch
from accelerate import Accelerator
from torch import Tensor

from graft_inference import GraftEngine, GraftError
from graft_inference.heads.eagle3.model import DraftHead
from graft_inference.policy.plan import Plan, Policy, Stage
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.target.model import Target, check_supported, max_positions
from graft_train.data.sharded import whole
from graft_train.data.states import TappedTarget
from graft_train.distill.batches import Row
from graft_train.processes import say


def held_out_prompts(target: TappedTarget, rows: list[Row], chosen: list[int], count: int, tokens: int) -> list[Tensor]:
    """The first prompts of the chosen rows that leave room for `tokens` more; none if the engine refuses the target."""
    try:
        check_supported(target.model)
    except GraftError as error:
        say(f"distill: the acceptance length in the engine is not measured: {error}")
        return []
    limit = max_positions(target.model.config.get_text_config()) - tokens
    prompts = [rows[row].tokens_S[: int(rows[row].loss_mask_S.nonzero()[0])] for row in chosen]
    return [prompt for prompt in prompts if 0 < len(prompt) <= limit][:count]


def measure_tau(
    accelerator: Accelerator, target: TappedTarget, head: DraftHead, prompts: list[Tensor], steps: int, tokens: int
) -> float:
    """Decodes the prompts greedily with chains of `steps` drafts, shared out over the processes; a target that is
    shared out itself decodes all of them on each.

    Returns:
        Tokens per target pass, the bonus token included, over all prompts.
    """
    chain = Plan((Stage(passes=steps, drafted=steps),), topk=1, budget=steps + 1)
    with whole(head.parameters()):
        # Not a copy of the module, which DeepSpeed has put its hooks on.
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in head.state_dict().items()}
    served = DraftHead.of_tensors(head.config, tensors)
    served = served.to(device=target.model.device, dtype=target.model.dtype).eval()
    engine_target = Target(target.model, head.config.aux_layer_ids)
    nothing = SuccessorMatrix(torch.full((1, 1), -1, device=target.model.device))
    engine = GraftEngine(engine_target, Policy(chain, chain, chain), served, nothing)
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

"""Checks that tree attention gives the logits of the untouched model. Runs once, when an engine is built."""

import torch
from torch import Tensor

from ..errors import GraftError
from ..tree import DraftTree, Source
from .attention import UntoldError, Visibility
from .model import Target

PROMPT = 12
PARENTS = (0, 0, 0, 1, 2, 3, 4)
"""Two branches of three nodes below the root, their rows interleaved."""
BRANCHES = ((0, 1, 3, 5), (0, 2, 4, 6))


@torch.inference_mode()
def self_check(target: Target) -> None:
    """Compares the logits of a small tree with passes of the untouched model over its branches.

    Raises:
        GraftError: they differ by more than rounding, a layer that has a sliding window does not apply it, or a pass
            fails. The model is restored.
    """
    with target.released_on_failure():
        try:
            _compare(target)
        except UntoldError as error:
            name = type(target.model).__name__
            raise GraftError(
                f"{name} cannot be served: it does not hand on to its attention which tokens of a tree a row sees"
            ) from error


def _compare(target: Target) -> None:
    name = type(target.model).__name__
    rows = len(PARENTS)
    tokens = (torch.arange(PROMPT + rows, device=target.device) * 7919 + 13) % target.config.vocab_size
    prompt_S, tree = tokens[:PROMPT], _tree(tokens[PROMPT:])
    cache = target.new_cache(PROMPT + rows)
    target.prefill(prompt_S[:5], cache)
    visible = Visibility(torch.arange(5, PROMPT, device=target.device), cache.span)
    target.forward(prompt_S[5:], cache, visible)
    cache.commit(PROMPT - 5)
    logits_NV = target.verify(tree, tree.ancestors(3), cache).logits_NV.float()
    branches_BD = torch.tensor(BRANCHES, device=target.device)
    lines_BS = torch.cat((prompt_S.expand(len(BRANCHES), -1), tree.tokens_N[branches_BD]), dim=1)
    expected_BDV = _own_logits(target, lines_BS)
    scale = (expected_BDV - expected_BDV.mean(dim=-1, keepdim=True)).norm()
    error = float((logits_NV[branches_BD] - expected_BDV).norm() / scale)
    tolerance = 1e-3 if target.model.dtype == torch.float32 else 0.1
    if not error <= tolerance:
        raise GraftError(
            f"{name} gives other logits under tree attention than alone (relative error {error:.2g}): this family "
            "cannot be served without changing its output. check=False skips this test"
        )
    window = getattr(target.config, "sliding_window", None)
    if window and window not in visible.windows and _applies_window(target, lines_BS, expected_BDV):
        raise GraftError(f"{name} has sliding layers, but hides their window of {window} from its attention function")


def _own_logits(target: Target, lines_BS: Tensor) -> Tensor:
    """What the untouched model says after the prompt."""
    with target.own_attention() as model:
        return model(input_ids=lines_BS, use_cache=False).logits[:, PROMPT:].to(target.device).float()


def _applies_window(target: Target, lines_BS: Tensor, expected_BDV: Tensor) -> bool:
    """Whether the untouched model hides tokens by a sliding window; the lines are too short to feel most of them."""
    if "sliding_attention" in (getattr(target.config, "layer_types", None) or ()):
        return True
    window = target.config.sliding_window
    try:
        target.config.sliding_window = 2
        return not torch.equal(_own_logits(target, lines_BS), expected_BDV)
    finally:
        target.config.sliding_window = window


def _tree(tokens_N: Tensor) -> DraftTree:
    parents_N = torch.tensor(PARENTS, device=tokens_N.device)
    depths = [0]
    for row in range(1, len(PARENTS)):
        depths.append(depths[PARENTS[row]] + 1)
    depths_N = torch.tensor(depths, device=tokens_N.device)
    sources_N = torch.full_like(tokens_N, Source.DRAFTED)
    sources_N[0] = Source.ROOT
    return DraftTree(tokens_N, parents_N, depths_N, torch.zeros(len(PARENTS)), sources_N, torch.zeros_like(tokens_N))

"""One round of the decode loop, for one prompt or several: draft, retrieve, verify, commit, observe.

The trees of several prompts lie one after the other in a single pass of the target, which reads its weights once
for all of them; nothing is padded, and each tree sees its own prompt's cache alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..speculator import Chosen, Speculator, read_records
from ..target.model import Target, TargetOutput
from ..tree import DraftTree
from ..verification import Acceptance, Emitted, accept, of_record, to_record
from .state import DecodeState


@dataclass
class Verified:
    """A tree, and the result of its verification.

    Attributes:
        output: the target's logits and aux hidden states at every node.
        acceptance: which nodes were accepted.
        logp_N: log-probabilities of the drawn tokens; None where they are not wanted.
    """

    tree: DraftTree
    output: TargetOutput
    acceptance: Acceptance
    logp_N: Tensor | None


def run_round(target: Target, speculator: Speculator, states: Sequence[DecodeState]) -> list[Emitted]:
    """Runs one round of every prompt, with one pass of the target; returns the tokens it emits for each.

    `captured.py` replays `verify` and `keep`, and the speculator's own steps, as CUDA graphs.
    """
    requests = [state.speculation for state in states]
    for state in states:
        state.clock.start()
        places, vocab_size = 1 + state.speculation.builder.max_depth, target.config.vocab_size
        state.speculation.noise = state.sampler.noise(state.place, places, vocab_size, target.device)
    drafts = speculator.draft(requests)
    _mark(states, "draft")
    chosen = speculator.build(requests, drafts)
    depths = [one.builder.depths[checkpoint.steps] for one, (checkpoint, _) in zip(requests, chosen, strict=True)]
    ancestors = [tree.ancestors(depth) for (_, tree), depth in zip(chosen, depths, strict=True)]
    _mark(states, "graft")
    outputs = target.verify_all([tree for _, tree in chosen], ancestors, [state.cache for state in states])
    _mark(states, "verify")
    parts = zip(states, chosen, outputs, ancestors, depths, strict=True)
    verified = [judge(state, tree, output, own_NN, depth) for state, (_, tree), output, own_NN, depth in parts]
    emitted = commit(states, chosen, verified)
    _mark(states, "commit")
    return emitted


def judge(state: DecodeState, tree: DraftTree, output: TargetOutput, ancestors_NN: Tensor, max_depth: int) -> Verified:
    """Draws the target's token at every node and follows the ones that match. Nothing waits for the device.

    Args:
        ancestors_NN: `tree.ancestors(max_depth)`.
    """
    wanted, noise = state.logprobs is not None, state.speculation.noise
    drawn_N, logp_N = state.sampler.draw(tree, output.logits_NV, noise, max_depth, state.history_S, wanted)
    return Verified(tree, output, accept(tree, ancestors_NN, drawn_N, max_depth), logp_N)


def keep(state: DecodeState, verified: Verified, count: int | None) -> Tensor:
    """Keeps the accepted branch in the KV cache, and passes the verified tree on to head and sources.

    Args:
        count: number of accepted nodes, if the host knows it; else tensors have the greatest depth's shape.

    Returns:
        Log-probabilities of the emitted tokens, [A]; empty where they are not wanted.
    """
    path_A, output = verified.acceptance.path_D[:count], verified.output
    state.cache.keep_branch(path_A)
    state.speculation.observe(verified.tree, output.logits_NV, output.aux_NE, verified.acceptance, count)
    if state.aux is not None:
        state.aux.append(output.aux_NE[path_A])
    return torch.empty(0) if verified.logp_N is None else verified.logp_N[path_A]


def commit(states: Sequence[DecodeState], chosen: Sequence[Chosen], verified: Sequence[Verified]) -> list[Emitted]:
    """Keeps the accepted branches. This is the one host read that every round needs."""
    records = read_records([to_record(one.tree, one.acceptance) for one in verified])
    emitted = []
    for state, (checkpoint, _), one, record in zip(states, chosen, verified, records, strict=True):
        tokens, sources = of_record(record)
        logp_A = keep(state, one, len(tokens))
        state.cache.commit(len(tokens))
        state.emit(state.speculation.fresh_tokens_A, logp_A)
        state.note(tokens, checkpoint)
        emitted.append((tokens, sources))
    return emitted


def _mark(states: Sequence[DecodeState], phase: str) -> None:
    for state in states:
        state.clock.mark(phase)

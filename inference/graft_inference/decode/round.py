"""One round of the decode loop, for one prompt or several: draft, retrieve, verify, commit, observe.

The trees of several prompts lie one behind the other in a single pass of the target, which reads its weights once
for all of them; nothing is padded, and each tree sees its own prompt's cache alone.
"""

from collections.abc import Sequence

from torch import Tensor

from ..speculator import Chosen, Speculator, read_records
from ..target.model import Target, TargetOutput
from ..verification import Acceptance, Emitted, accept, of_record, to_record
from .state import DecodeState


def run_round(target: Target, speculator: Speculator, states: Sequence[DecodeState]) -> list[Emitted]:
    """One pass of the target: what it emits for each prompt."""
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
    accepted, logprobs = [], []
    for state, (_, tree), ancestors_NN, depth, output in zip(states, chosen, ancestors, depths, outputs, strict=True):
        wanted = state.logprobs is not None
        noise = state.speculation.noise
        drawn_N, logp_N = state.sampler.draw(tree, output.logits_NV, noise, depth, state.history_S, wanted)
        accepted.append(accept(tree, ancestors_NN, drawn_N, depth))
        logprobs.append(logp_N)
    emitted = commit(states, chosen, outputs, accepted, logprobs)
    _mark(states, "commit")
    return emitted


def commit(
    states: Sequence[DecodeState],
    chosen: Sequence[Chosen],
    outputs: Sequence[TargetOutput],
    accepted: Sequence[Acceptance],
    logprobs: Sequence[Tensor | None],
) -> list[Emitted]:
    """Keeps the accepted branches and tells the proposers; the host read that every round has is here."""
    records = read_records([to_record(tree, one) for (_, tree), one in zip(chosen, accepted, strict=True)])
    emitted = []
    for state, (checkpoint, tree), output, acceptance, logp_N, record in zip(
        states, chosen, outputs, accepted, logprobs, records, strict=True
    ):
        tokens, sources = of_record(record)
        path_A = acceptance.path_D[: len(tokens)]
        state.cache.commit_branch(path_A)
        state.speculation.observe(tree, output.logits_NV, output.aux_NE, acceptance, len(tokens))
        state.emit(state.speculation.fresh_tokens_A, None if logp_N is None else logp_N[path_A])
        state.tokens += tokens
        state.stats.rounds += 1
        state.stats.checkpoints[checkpoint.name] += 1
        emitted.append((tokens, sources))
    return emitted


def _mark(states: Sequence[DecodeState], phase: str) -> None:
    for state in states:
        state.clock.mark(phase)

"""Reading prompts, piece by piece; pieces of several prompts share a pass of the target."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..speculator import Speculator
from ..target.model import Target
from ..tree import root_tree
from .state import DecodeState

Piece = tuple[int, int, int]
"""Index of a prompt, and where its piece starts and ends."""


def prefill(
    target: Target, speculator: Speculator, states: Sequence[DecodeState], prompts: Sequence[Tensor], chunk: int
) -> list[int]:
    """Reads what the caches do not hold yet of each prompt, and draws its first token: one host read for all.

    The head reads the last piece of a single prompt when it drafts for the first time, so that the first token need not
    wait for it. The last pieces of a batch would be too much for one pass: all but their last positions are read here.

    Args:
        states: of one plan.
        prompts: [S] int64 each.
        chunk: most tokens of a pass.
    """
    spans = [(state.cache.length, len(prompt_S)) for state, prompt_S in zip(states, prompts, strict=True)]
    for pieces in passes(spans, chunk):
        _read(target, speculator, states, prompts, pieces)
    first = torch.cat([state.speculation.root_1 for state in states]).tolist()
    for state, token in zip(states, first, strict=True):
        state.tokens.append(token)
    return first


def passes(spans: Sequence[tuple[int, int]], chunk: int) -> Iterator[list[Piece]]:
    """Every prompt cut as if it were alone, and as many pieces in a pass as have no more than `chunk` tokens together.

    A matrix learns piece by piece: what it learns of a prompt must not depend on the others.

    Args:
        spans: where reading starts and ends, of each prompt.
    """
    waiting = [(index, start) for index, (start, _) in enumerate(spans)]
    while waiting:
        room, taken, left = chunk, [], []
        for index, start in waiting:
            end = min(start + chunk, spans[index][1])
            if end - start > room:
                left.append((index, start))
                continue
            room -= end - start
            taken.append((index, start, end))
            if end < spans[index][1]:
                left.append((index, end))
        yield taken
        waiting = left


def _read(
    target: Target,
    speculator: Speculator,
    states: Sequence[DecodeState],
    prompts: Sequence[Tensor],
    pieces: list[Piece],
) -> None:
    """One pass of the target over these pieces, and one of the head over what is not left to the first draft."""
    tokens = [prompts[index][start:end] for index, start, end in pieces]
    caches = [states[index].cache for index, _, _ in pieces]
    outputs = target.prefill_all(tokens, caches, states[0].speculation.learns)
    heads, fresh = [], []
    for (index, start, end), piece_S, output in zip(pieces, tokens, outputs, strict=True):
        state, prompt_S = states[index], prompts[index]
        request = state.speculation
        request.read(piece_S, output.logits_NV)
        if state.aux is not None:
            state.aux.append(output.aux_NE)
        tokens_A, aux_AE, now = prompt_S[start + 1 : end + 1], output.aux_NE, end - start
        if end == len(prompt_S):
            _draw_first(target, state, output.logits_NV[-1:])
            tokens_A = torch.cat((tokens_A, request.root_1))
            now = now - 1 if len(states) > 1 else 0
        if request.head is not None and now:
            heads.append(request.head)
            fresh.append((tokens_A[:now], aux_AE[:now]))
            tokens_A, aux_AE = tokens_A[now:], aux_AE[now:].clone()  # not a view, which would keep all of them
        request.fresh_tokens_A, request.fresh_aux_AE = tokens_A, aux_AE
    if heads:
        speculator.head.read(heads, fresh)


def _draw_first(target: Target, state: DecodeState, logits_1V: Tensor) -> None:
    """The token after the prompt, which becomes the first round's root."""
    request = state.speculation
    noise = state.sampler.noise(0, 1, target.config.vocab_size, target.device)
    tree, wanted = root_tree(request.root_1), state.logprobs is not None
    request.root_1, logp_1 = state.sampler.draw(tree, logits_1V, noise, 0, state.history_S, wanted)
    state.emit(request.root_1, logp_1)
    for source in request.sources.values():
        source.extend(request.root_1)

"""The trees of block heads against plain searches, what slots see against loops, and what heads leave unread."""

import heapq
import math
from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft_inference.heads.block.drafter import BlockDraft, BlockProposer
from graft_inference.heads.block.model import BlockHead
from graft_inference.heads.block.view import View
from graft_inference.heads.draft import DEFERRED, HeadState, Layer, deferred
from graft_inference.noise import Noise, gumbel
from graft_inference.tree import Source, child_paths

from .test_block_drafter import LAYOUTS, SMALL, tiny_block_head
from .tiny import tiny_model
from .trees import CPU, token_path

KINDS = ("fill-in", "next token", "markov", "reduced", "markov fill-in")


@cache
def head_of(layout: str) -> BlockHead:
    return tiny_block_head(tiny_model("llama", vocab_size=SMALL), **LAYOUTS[layout])


def log_softmax(scores: list[float]) -> list[float]:
    total = math.log(sum(map(math.exp, scores)))
    return [score - total for score in scores]


def after(head: BlockHead, logits_KD, slot: int, before: int, noise: Noise | None) -> dict[int, float]:
    """Log-probabilities of target tokens in a slot behind a token."""
    ids = head.target_ids.tolist()
    scores = logits_KD[slot].tolist()
    if head.config.markov_rank:
        bias = head.markov_head.markov_w2.weight @ head.markov_head.markov_w1.weight[before]
        scores = [score + more for score, more in zip(scores, bias.tolist(), strict=True)]
    if noise is not None:
        told = noise.gumbel_PV[slot, ids].tolist()
        scores = [score / noise.temperature + more for score, more in zip(scores, told, strict=True)]
    return dict(zip(ids, log_softmax(scores), strict=True))


def beam(head, logits_KD, root, topk, depth, noise) -> dict[tuple[int, ...], float]:
    """{token path: log-probability}: the topk likeliest tokens behind each of the topk best paths of every depth."""
    found, best = {}, [((), 0.0)]
    for slot in range(depth):
        layer = {}
        for path, score in best:
            steps = after(head, logits_KD, slot, (root, *path)[-1], noise)
            for token in sorted(steps, key=lambda token: -steps[token])[:topk]:
                layer[(*path, token)] = score + steps[token]
        found |= layer
        best = sorted(layer.items(), key=lambda item: -item[1])[:topk]
    return found


@pytest.mark.parametrize("layout", KINDS)
@given(st.integers(0, 2**32), st.integers(0, SMALL - 1), st.integers(1, 4), st.integers(1, 4), st.booleans())
@torch.inference_mode()
def test_a_block_becomes_the_tree_of_a_plain_search(layout, seed, root, topk, depth, told):
    """Where slots do not depend on each other, its best paths are the best that there are."""
    head, root_1 = head_of(layout), torch.tensor([root])
    logits_KD = 2 * torch.randn(
        head.config.drafts, head.config.draft_vocab_size, generator=torch.Generator().manual_seed(seed)
    )
    noise = Noise(gumbel(seed, 0, 5, SMALL, CPU), 0.7) if told else None
    proposer, state = BlockProposer(head, None, None, 64), HeadState((1, 1, 1), topk, 4, logits_KD)
    draft = BlockDraft(root_1, [], noise, logits_KD)
    draft.layers.append(Layer.below_root(*proposer._children(draft, topk, root_1)))
    for _ in range(depth - 1):
        (draft,) = proposer.deepen([state], [draft])
    tree, expected = draft.candidates, beam(head, logits_KD, root, topk, depth, noise)
    assert draft.steps == depth
    found = {token_path(tree, row): float(tree.logp_N[row]) for row in range(1, len(tree))}
    assert len(found) == len(tree) - 1
    assert found == pytest.approx(expected, abs=1e-3)
    deepest = {path: score for path, score in expected.items() if len(path) == depth}
    assert float(draft.confidence.log()) == pytest.approx(max(deepest.values()), abs=1e-3)
    assert tree.sources_N.tolist() == [Source.ROOT] + [Source.DRAFTED] * len(found)
    for row in range(1, len(tree)):
        parent = int(tree.parents_N[row])
        assert parent < row
        assert int(tree.depths_N[row]) == int(tree.depths_N[parent]) + 1
        assert tree.paths_N[row] == child_paths(tree.paths_N[parent], tree.tokens_N[row])
    if not head.config.markov_rank and depth < 4:
        slots = [after(head, logits_KD, slot, root, noise) for slot in range(depth)]
        ids = head.target_ids.tolist()
        sums = [sum(slots[slot][token] for slot, token in enumerate(path)) for path in product(ids, repeat=depth)]
        best = sorted(deepest.values(), reverse=True)[:topk]
        assert best == pytest.approx(sorted(sums, reverse=True)[: len(best)], abs=1e-3)


def best_first(head, logits_KD, root, nodes, depth) -> list[float]:
    """Scores of the best paths that there are, by a heap (DDTree; with a Markov head DARTree)."""
    heap, found = [(0.0, ())], []
    while heap and len(found) <= nodes:
        score, path = heapq.heappop(heap)
        found.append(-score)
        if len(path) < depth:
            steps = after(head, logits_KD, len(path), (root, *path)[-1], None)
            for token, more in steps.items():
                heapq.heappush(heap, (score - more, (*path, token)))
    return found[1:]


@pytest.mark.parametrize("layout", KINDS)
@given(st.integers(0, 2**32), st.integers(0, SMALL - 1), st.integers(1, 6))
@torch.inference_mode()
def test_with_as_many_children_as_nodes_a_plan_verifies_the_best_first_tree(layout, seed, root, nodes):
    head = head_of(layout)
    depth, draft_ids = head.config.drafts, head.config.draft_vocab_size
    nodes = min(nodes, draft_ids)
    logits_KD = torch.randn(depth, draft_ids, generator=torch.Generator().manual_seed(seed))
    proposer, state = BlockProposer(head, None, None, 64), HeadState((1, 1, 1), nodes, 4, logits_KD)
    draft = BlockDraft(torch.tensor([root]), [], None, logits_KD)
    draft.layers.append(Layer.below_root(*proposer._children(draft, nodes, draft.root_1)))
    for _ in range(depth - 1):
        (draft,) = proposer.deepen([state], [draft])
    tree = draft.candidates
    chosen = tree.chosen(tree.logp_N, nodes + 1)
    assert Source.EMPTY not in chosen.sources_N
    assert chosen.logp_N[1:].tolist() == pytest.approx(best_first(head, logits_KD, root, nodes, depth), abs=1e-3)


@given(st.booleans(), st.one_of(st.none(), st.integers(1, 6)), st.booleans(), st.integers(0, 8), st.integers(1, 5))
def test_a_slot_sees_what_its_view_says(causal, window, from_anchor, context, slots):
    """The anchor stands in slot 0; a window counts from the slot, or back from the anchor."""
    view = View(causal, window, from_anchor)

    def sees(slot: int, place: int) -> bool:
        if causal and place > slot:
            return False
        return window is None or (place >= -window if from_anchor else slot - place < window)

    mask = view.mask(context, slots, CPU)
    expected = [[sees(slot, place) for place in range(-context, slots)] for slot in range(slots)]
    assert mask is None if not causal and window is None else mask.tolist() == expected
    assert all(map(all, expected)) or mask is not None


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=12))
def test_what_a_head_leaves_unread_it_reads_in_order_with_what_comes_next(pieces):
    """And never leaves more than its bound."""
    state = HeadState((1, 1, 1), 1, 4, torch.zeros(1, 1))
    waiting, place = [], 0
    for size, waits in pieces:
        tokens_A = torch.arange(place, place + size)
        fresh, place = (tokens_A, tokens_A[:, None].float()), place + size
        waiting += tokens_A.tolist()
        if waits and not deferred([state], [fresh]):
            assert state.unread == len(waiting) < DEFERRED
            continue
        if waits:
            assert state.unread == len(waiting) >= DEFERRED
            fresh = state.deferred.pop()
        read_A, aux_AE = state.caught_up(*fresh)
        assert read_A.tolist() == aux_AE[:, 0].tolist() == waiting
        assert (state.unread, state.deferred) == (0, [])
        waiting = []

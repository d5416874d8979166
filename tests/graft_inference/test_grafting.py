"""Scores of the nodes that compete, against their formula written out."""

import math
from dataclasses import replace

import pytest
import torch

from graft_inference import Stage
from graft_inference.grafting import Grafter
from graft_inference.retrieval import SuccessorMatrix
from graft_inference.sampling import Noise
from graft_inference.tree import DraftTree, Source, child_paths

from .test_tree import token_path
from .tiny import beneath_plan

CPU = torch.device("cpu")
SUCCESSORS = {2: [0, 1, 3, 4], 1: [4, 3, 0, 2], 0: [1, -1, -1, -1]}
PROBS = {2: [0.4, 0.3, 0.2, 0.1], 1: [0.5, 0.3, 0.1, 0.05], 0: [0.9, 0, 0, 0]}
STEPS = {0: math.log(0.2), 1: math.log(0.6), 3: math.log(0.1)}


def drafted() -> DraftTree:
    """Root 2; its drafted children 0, 1 and 3, the leaves 1 and 0 the likeliest."""
    tokens, zero = torch.tensor([2, *STEPS]), torch.zeros(4, dtype=torch.long)
    paths = torch.cat((zero[:1], child_paths(zero[1:], tokens[1:])))
    sources = torch.tensor([Source.ROOT, *[Source.DRAFTED] * 3])
    return DraftTree(
        tokens, zero, (zero + 1).index_fill(0, zero[:1], 0), torch.tensor([0.0, *STEPS.values()]), sources, paths
    )


def matrix() -> SuccessorMatrix:
    ids, probs = torch.full((5, 4), -1, dtype=torch.int32), torch.zeros(5, 4, dtype=torch.float16)
    for token in SUCCESSORS:
        ids[token], probs[token] = torch.tensor(SUCCESSORS[token]), torch.tensor(PROBS[token])
    return SuccessorMatrix(ids, probs)


def accepted(slope: float, offset: float, q: float) -> float:
    return -math.log1p(math.exp(-(slope * math.log(q / (1 - q)) + offset)))


@pytest.mark.parametrize("told", [False, True])
def test_successors_beneath_leaves_are_scored_as_the_roots_are(told):
    """log P = the leaf's own + sigmoid(slope * logit(q) + offset + rank's): at depth 2 the noise is that of depth 2."""
    plan = beneath_plan()
    plan = replace(plan, stages=(Stage(1, width=10),), scale=replace(plan.scale, template=(), echo=()))
    scale = plan.scale
    noise = Noise(torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), 0.7) if told else None
    tree = Grafter(plan, CPU).tree(plan.stages[0], drafted(), [], matrix(), noise)
    found = {token_path(tree, row): float(tree.logp_N[row]) for row in range(10) if tree.sources_N[row] >= 0}
    expected = {(): 0.0} | {(token,): accepted(*scale.drafted[0], math.exp(step)) for token, step in STEPS.items()}
    slope, offset = scale.retrieved[0]
    for leaf in (1, 0):
        named = {token: prob for token, prob in zip(SUCCESSORS[leaf], PROBS[leaf], strict=True) if token >= 0}
        scores = {token: math.log(prob) for token, prob in named.items()}
        if noise:
            scores = {token: score / 0.7 + float(noise.gumbel_PV[1, token]) for token, score in scores.items()}
            total = sum(map(math.exp, scores.values())) + (1 - sum(named.values())) * math.exp(0.5772156649)
            scores = {token: score - math.log(total) for token, score in scores.items()}
        for rank, token in enumerate(sorted(scores, key=lambda token: -scores[token])):
            step = accepted(slope, offset + scale.ranks[rank], math.exp(scores[token]))
            expected[leaf, token] = expected[leaf,] + step
    assert found == pytest.approx(expected, abs=2e-3)
    assert len(found) == 9


def test_the_rows_of_grafts_beneath_leaves_stay_empty_in_prunes_own_trees():
    plan = beneath_plan().without_retrieval()
    tree = Grafter(plan, CPU).tree(Stage(1, width=10), drafted(), [], matrix())
    assert set(tree.sources_N.tolist()) == {Source.ROOT, Source.DRAFTED, Source.EMPTY}

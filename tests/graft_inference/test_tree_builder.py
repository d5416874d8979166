"""Scores of the nodes that compete, against their formula written out."""

import math
from dataclasses import replace

import pytest
import torch

from graft_inference import Checkpoint
from graft_inference.noise import Noise
from graft_inference.policy.tree_builder import builder_of
from graft_inference.retrieval.successor_matrix import MatrixSource, SuccessorMatrix
from graft_inference.tree import DraftTree, Source, child_paths

from .tiny import learned_plan

CPU = torch.device("cpu")
SUCCESSORS = {2: [0, 1, 3, 4]}
PROBS = {2: [0.4, 0.3, 0.15, 0.1]}
STEPS = {0: math.log(0.2), 1: math.log(0.6), 3: math.log(0.1)}


def drafted() -> DraftTree:
    """Root 2; its drafted children 0, 1 and 3."""
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
def test_both_sources_are_scored_on_one_scale(told):
    """log P = sigmoid(slope * logit(q) + offset), and a rank's where it is retrieved; the better where both name it."""
    plan = replace(learned_plan(), checkpoints=(Checkpoint(1, num_draft_tokens=5),))
    model = replace(plan.acceptance.sources[0], template=((0,), (1,), (2,), (3,)))
    plan = replace(plan, acceptance=replace(plan.acceptance, sources=(model,)))
    noise = Noise(torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), 0.7) if told else None
    builder = builder_of(plan, CPU)
    retrieved = builder.retrieve(plan.checkpoints[0], {"matrix": MatrixSource(matrix())}, torch.tensor([2]), noise)
    tree = builder.build(plan.checkpoints[0], drafted(), retrieved)
    found = {int(tree.tokens_N[row]): float(tree.logp_N[row]) for row in range(1, 5)}

    scores = {token: math.log(prob) for token, prob in zip(SUCCESSORS[2], PROBS[2], strict=True)}
    if noise:
        scores = {token: score / 0.7 + float(noise.gumbel_PV[0, token]) for token, score in scores.items()}
        total = sum(map(math.exp, scores.values())) + (1 - sum(PROBS[2])) * math.exp(0.5772156649)
        scores = {token: score - math.log(total) for token, score in scores.items()}
    slope, offset = model.slopes[0], model.offsets[0][0]
    expected = {
        token: accepted(slope, offset + model.ranks[rank], math.exp(scores[token]))
        for rank, token in enumerate(sorted(scores, key=lambda token: -scores[token]))
    }
    for token, step in STEPS.items():
        expected[token] = max(expected[token], accepted(*plan.acceptance.drafted[0], math.exp(step)))
    assert found == pytest.approx(expected, abs=2e-3)

"""Acceptance on hand-made trees, and as a distribution against exact enumeration."""

import torch
from scipy.stats import chisquare

from graft_inference.tree import DraftTree, Source
from graft_inference.verification import accept, draw


def tree_of(tokens, parents, depths, sources=None):
    columns = [torch.tensor(column) for column in (tokens, parents, depths)]
    sources = sources or [Source.ROOT] + [Source.DRAFTED] * (len(tokens) - 1)
    zeros = torch.zeros(len(tokens))
    return DraftTree(*columns, zeros, torch.tensor(sources), zeros.long())


def test_follows_matches_from_the_root():
    #        root 9 -> 1 -> 3 -> 5
    #               -> 2    -> 4
    tree = tree_of([9, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 3], [0, 1, 1, 2, 2, 3])
    drawn = torch.tensor([1, 4, 0, 5, 7, 0])
    result = accept(tree, tree.ancestors(3), drawn, 3)
    assert result.count == 3
    assert result.path_D[:3].tolist() == [0, 1, 4]
    assert result.emitted_D[:3].tolist() == [1, 4, 7], "two accepted nodes and the bonus token"
    assert result.accepted_N.tolist() == [True, True, False, False, True, False]


def test_a_match_below_a_rejected_node_is_not_accepted():
    tree = tree_of([9, 1, 3], [0, 0, 1], [0, 1, 2])
    result = accept(tree, tree.ancestors(2), torch.tensor([2, 3, 0]), 2)
    assert result.count == 1
    assert result.emitted_D[0] == 2


def test_empty_rows_are_never_accepted():
    tree = tree_of([9, 0], [0, 0], [0, 0], [Source.ROOT, Source.EMPTY])
    assert accept(tree, tree.ancestors(1), torch.tensor([0, 0]), 1).count == 1


def test_two_emitted_tokens_follow_the_targets_law():
    """Tree over a 4-token Markov target: the joint law of the first two tokens, chi-square at 20,000 draws."""
    torch.manual_seed(0)
    law = torch.rand(4, 4).softmax(-1).pow(2)
    law /= law.sum(-1, keepdim=True)
    tree = tree_of([0, 1, 2, 0, 3, 1], [0, 0, 0, 1, 1, 2], [0, 1, 1, 2, 2, 2])
    ancestors = tree.ancestors(2)
    logits = law.log()[tree.tokens_N]
    generator = torch.Generator().manual_seed(1)
    samples = 20_000
    seen = torch.zeros(4, 4)
    for _ in range(samples):
        result = accept(tree, ancestors, draw(logits, 1.0, generator), 2)
        first, second = result.emitted_D[:2].tolist()
        if result.count == 1:  # rejected at once: the next round draws the second token afresh
            second = int(torch.multinomial(law[first], 1, generator=generator))
        seen[first, second] += 1
    expected = samples * law[0][:, None] * law
    assert chisquare(seen.flatten(), expected.flatten()).pvalue > 1e-3


def test_temperature_scales_the_law():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(30_000, 1)
    drawn = draw(logits, 0.5, torch.Generator().manual_seed(0)).bincount(minlength=3)
    expected = 30_000 * (logits[0] / 0.5).softmax(-1)
    assert chisquare(drawn, expected.double() * 30_000 / expected.sum().double()).pvalue > 1e-3

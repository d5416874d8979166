"""Acceptance on hand-made trees."""

import torch

from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.tree import DraftTree, Source
from graft_inference.verification import accept, learn


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


def test_every_node_teaches_the_matrix_once_and_empty_rows_nothing():
    tree = tree_of([9, 1, 2, 0, 0], [0, 0, 1, 0, 0], [0, 1, 2, 0, 0])
    tree.sources_N[3:] = Source.EMPTY
    matrix = SuccessorMatrix(torch.full((10, 2), -1, dtype=torch.int32), torch.zeros(10, 2, dtype=torch.float16))
    logits = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    learn(matrix, tree, logits, accept(tree, tree.ancestors(2), torch.tensor([1, 5, 0, 0, 0]), 2))
    assert matrix.learned_V.tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 0, 1]
    for token, row in ((9, 0), (1, 1), (2, 2)):
        assert matrix.ids_VK[token].tolist() == logits[row].topk(2).indices.tolist()

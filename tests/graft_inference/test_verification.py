"""Acceptance on hand-made trees."""

import pytest
import torch

from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.tree import DraftTree, Source
from graft_inference.verification import accept, accepted_rows, every_row


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


def blank_matrix() -> SuccessorMatrix:
    return SuccessorMatrix(torch.full((10, 2), -1, dtype=torch.int32), torch.zeros(10, 2, dtype=torch.float16))


def teach(taught, tree, logits_NV, drawn, count=None) -> SuccessorMatrix:
    """A blank matrix after one round."""
    matrix = blank_matrix()
    depth = int(tree.depths_N.max())
    acceptance = accept(tree, tree.ancestors(depth), torch.tensor(drawn), depth)
    assert count is None or count == int(acceptance.count)
    rows_M, tokens_M, weight_M = taught(tree, acceptance, count)
    matrix.update(tokens_M, logits_NV[rows_M], weight_M)
    return matrix


def test_every_node_teaches_the_matrix_once_and_empty_rows_nothing():
    tree = tree_of([9, 1, 2, 0, 0], [0, 0, 1, 0, 0], [0, 1, 2, 0, 0])
    tree.sources_N[3:] = Source.EMPTY
    logits = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    matrix = teach(every_row, tree, logits, [1, 5, 0, 0, 0])
    assert matrix.learned_V.tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 0, 1]
    for token, row in ((9, 0), (1, 1), (2, 2)):
        assert matrix.ids_VK[token].tolist() == logits[row].topk(2).indices.tolist()


def test_of_nodes_with_one_token_the_accepted_one_teaches_the_matrix():
    #        root 9 -> 3 -> 4       the second 3 is accepted, the first 4 comes earlier in the tree
    #               -> 1 -> 3
    #               -> 4
    tree = tree_of([9, 3, 1, 4, 3, 4], [0, 0, 0, 1, 2, 0], [0, 1, 1, 2, 2, 1])
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    matrix = teach(every_row, tree, logits, [1, 0, 3, 0, 7, 0])
    assert matrix.learned_V.tolist() == [0, 1, 0, 2, 2, 0, 0, 0, 0, 1]
    for token, row in ((9, 0), (1, 2), (3, 4), (4, 3)):
        assert matrix.ids_VK[token].tolist() == logits[row].topk(2).indices.tolist()


#        root 9 -> 3 -> 9 -> 3       tokens stand there twice, and the root's own again
#               -> 1 -> 5
TREE = tree_of([9, 3, 1, 9, 5, 3, 0], [0, 0, 0, 1, 2, 3, 0], [0, 1, 1, 2, 2, 3, 0], None)
TREE.sources_N[6] = Source.EMPTY
DRAWN = {
    1: [2, 0, 0, 0, 0, 0, 0],
    2: [3, 0, 0, 0, 0, 0, 0],
    3: [3, 9, 0, 0, 0, 0, 0],
    4: [3, 9, 0, 3, 0, 8, 0],
}


@pytest.mark.parametrize("taught", [accepted_rows, every_row])
@pytest.mark.parametrize("count", DRAWN)
def test_a_matrix_learns_the_same_where_the_host_does_not_know_how_many_were_accepted(taught, count):
    logits = torch.randn(7, 10, generator=torch.Generator().manual_seed(count))
    known = teach(taught, TREE, logits, DRAWN[count], count)
    unknown = teach(taught, TREE, logits, DRAWN[count])
    for mine, theirs in zip(known.tensors, unknown.tensors, strict=True):
        assert torch.equal(mine, theirs)
    accepted = [9, 3, 9, 3][:count]
    expected = [accepted.count(token) for token in range(10)]
    assert known.learned_V.tolist() == (expected if taught is accepted_rows else [0, 1, 0, 2, 0, 1, 0, 0, 0, 2])
    last = {token: [0, 1, 3, 5][place] for place, token in enumerate(accepted)}  # the later row of a token counts
    for token, row in last.items():
        if taught is accepted_rows:
            assert known.ids_VK[token].tolist() == logits[row].topk(2).indices.tolist()

"""Acceptance on hand-made trees, and against a walk down trees that Hypothesis draws."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft_inference.retrieval.sources import number_of
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.tree import DraftTree, Source
from graft_inference.verification import accept, accepted_rows, every_row, of_record, to_record

from .trees import VOCAB, tree_of, trees, wild_scores

NAMES = {Source.DRAFTED: "drafted", number_of("matrix"): "matrix", number_of("lookup"): "lookup"}


@st.composite
def drawn_trees(draw) -> tuple[DraftTree, list[int], int]:
    """A tree with EMPTY rows among others of any source, the target's draws, and a bound on its depth.

    Most draws follow a child, so that branches are accepted as deep as they are.
    """
    tree = draw(trees())
    scores = draw(st.one_of(st.just(tree.logp_N), wild_scores(len(tree))))
    chosen = tree.chosen(scores, draw(st.integers(1, 14)))
    sources = draw(st.lists(st.sampled_from(list(NAMES)), min_size=len(chosen), max_size=len(chosen)))
    sources_N = torch.where(chosen.sources_N == Source.DRAFTED, torch.tensor(sources), chosen.sources_N)
    drawn = []
    for row in range(len(chosen)):
        children = chosen.tokens_N[(chosen.parents_N == row) & (sources_N != Source.EMPTY)].tolist()
        drawn.append(draw(st.sampled_from(children)) if children and draw(st.booleans()) else draw(TOKENS))
    return replace(chosen, sources_N=sources_N), drawn, int(chosen.depths_N.max()) + draw(st.integers(0, 3))


TOKENS = st.integers(0, VOCAB - 1)


def walked(tree: DraftTree, drawn: list[int]) -> list[int]:
    """Rows from the root on, each the child of the last one that carries the target's token."""
    path = [0]
    while True:
        children = [
            row
            for row in range(1, len(tree))
            if tree.sources_N[row] != Source.EMPTY
            and int(tree.parents_N[row]) == path[-1]
            and int(tree.tokens_N[row]) == drawn[path[-1]]
        ]
        if not children:
            return path
        (child,) = children
        path.append(child)


@given(drawn_trees())
def test_what_is_accepted_is_what_a_walk_along_the_draws_finds(case):
    tree, drawn, max_depth = case
    result = accept(tree, tree.ancestors(max_depth), torch.tensor(drawn), max_depth)
    path = walked(tree, drawn)
    assert int(result.count) == len(path)
    assert result.path_D[: len(path)].tolist() == path
    assert result.emitted_D[: len(path)].tolist() == [drawn[row] for row in path]
    assert result.accepted_N.nonzero().flatten().tolist() == sorted(path)
    assert len(result.path_D) == len(result.emitted_D) == max_depth + 1
    emitted, names = of_record(to_record(tree, result).tolist())
    assert emitted == [drawn[row] for row in path]
    assert names == [NAMES[int(tree.sources_N[row])] for row in path[1:]] + ["bonus"]


def test_follows_matches_from_the_root():
    #        root 9 -> 1 -> 3 -> 5
    #               -> 2    -> 4
    tree = tree_of([9, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 3])
    drawn = torch.tensor([1, 4, 0, 5, 7, 0])
    result = accept(tree, tree.ancestors(3), drawn, 3)
    assert result.count == 3
    assert result.path_D[:3].tolist() == [0, 1, 4]
    assert result.emitted_D[:3].tolist() == [1, 4, 7], "two accepted nodes and the bonus token"
    assert result.accepted_N.tolist() == [True, True, False, False, True, False]


def test_a_match_below_a_rejected_node_is_not_accepted():
    tree = tree_of([9, 1, 3], [0, 0, 1])
    result = accept(tree, tree.ancestors(2), torch.tensor([2, 3, 0]), 2)
    assert result.count == 1
    assert result.emitted_D[0] == 2


def test_empty_rows_are_never_accepted():
    tree = tree_of([9, 0], [0, 0], sources=[Source.ROOT, Source.EMPTY])
    assert accept(tree, tree.ancestors(1), torch.tensor([0, 0]), 1).count == 1


@pytest.mark.parametrize("taught", [accepted_rows, every_row])
def test_nothing_of_a_verification_lies_on_another_device(taught):
    """Shown on the device without memory, which refuses what lies on the CPU, as a GPU does."""
    tree = tree_of([9, 1, 2], [0, 0, 1])
    moved = DraftTree(*(getattr(tree, column.name).to("meta") for column in fields(tree)))
    result = accept(moved, moved.ancestors(2), torch.tensor([1, 2, 0], device="meta"), 2)
    assert to_record(moved, result).is_meta
    assert all(one.is_meta for one in taught(moved, result, None))


def blank_matrix(tokens: int = 10) -> SuccessorMatrix:
    return SuccessorMatrix(torch.full((tokens, 2), -1, dtype=torch.int32), torch.zeros(tokens, 2, dtype=torch.float16))


def teach(taught, tree, logits_NV, drawn, max_depth=None, count=None) -> SuccessorMatrix:
    """A blank matrix after one round."""
    matrix = blank_matrix(logits_NV.shape[1])
    depth = int(tree.depths_N.max()) if max_depth is None else max_depth
    acceptance = accept(tree, tree.ancestors(depth), torch.tensor(drawn), depth)
    assert count is None or count == int(acceptance.count)
    rows_M, tokens_M, weight_M = taught(tree, acceptance, count)
    matrix.update(tokens_M, logits_NV[rows_M], weight_M)
    return matrix


@pytest.mark.parametrize("taught", [accepted_rows, every_row])
@given(drawn_trees())
def test_a_matrix_learns_the_same_whether_or_not_the_host_knows_how_many_were_accepted(taught, case):
    """And what it learns: of nodes with one token, the accepted ones first."""
    tree, drawn, max_depth = case
    logits_NV = torch.randn(len(tree), VOCAB, generator=torch.Generator().manual_seed(len(tree)))
    path = walked(tree, drawn)
    known = teach(taught, tree, logits_NV, drawn, max_depth, len(path))
    unknown = teach(taught, tree, logits_NV, drawn, max_depth)
    for mine, theirs in zip(known.tensors, unknown.tensors, strict=True):
        assert torch.equal(mine, theirs)
    if taught is accepted_rows:
        rows = path  # the deepest of them teaches last
    else:
        # The first one of the tree teaches last, and an accepted one after all others.
        rows = [row for row in reversed(range(len(tree))) if row == 0 or tree.sources_N[row] != Source.EMPTY]
        rows.sort(key=lambda row: row in path)
    teachers = {int(tree.tokens_N[row]): row for row in rows}
    tokens = tree.tokens_N[rows].tolist()
    assert known.learned_V.tolist() == [tokens.count(token) for token in range(VOCAB)]
    for token in range(VOCAB):
        expected = logits_NV[teachers[token]].topk(2).indices.tolist() if token in teachers else [-1, -1]
        assert known.ids_VK[token].tolist() == expected


def test_every_node_teaches_the_matrix_once_and_empty_rows_nothing():
    tree = tree_of([9, 1, 2, 0, 0], [0, 0, 1, 0, 0])
    tree.sources_N[3:] = Source.EMPTY
    logits = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    matrix = teach(every_row, tree, logits, [1, 5, 0, 0, 0])
    assert matrix.learned_V.tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 0, 1]
    for token, row in ((9, 0), (1, 1), (2, 2)):
        assert matrix.ids_VK[token].tolist() == logits[row].topk(2).indices.tolist()
    assert matrix.ids_VK[0].tolist() == [-1, -1]


def test_of_nodes_with_one_token_the_accepted_one_teaches_the_matrix():
    #        root 9 -> 3                   the last 3 and the last 4 are accepted, the others come much earlier
    #               -> 4 -> 5
    #               -> 1 -> 0
    #                    -> 2 -> 3 -> 4
    tree = tree_of([9, 3, 4, 1, 5, 0, 2, 3, 4], [0, 0, 0, 0, 2, 3, 3, 6, 7])
    logits = torch.randn(9, 10, generator=torch.Generator().manual_seed(1))
    matrix = teach(every_row, tree, logits, [1, 0, 0, 2, 0, 0, 3, 4, 7])
    assert matrix.learned_V.tolist() == [1, 1, 1, 2, 2, 1, 0, 0, 0, 1]
    for token, row in ((9, 0), (1, 3), (2, 6), (3, 7), (4, 8), (5, 4)):
        assert matrix.ids_VK[token].tolist() == logits[row].topk(2).indices.tolist()

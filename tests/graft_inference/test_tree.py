"""Tree algebra against plain references over Python lists and dictionaries, on trees that Hypothesis draws."""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft_inference.noise import LEAST, MEAN_GUMBEL, Noise, gumbel
from graft_inference.retrieval.sources import number_of
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.template import Template, check_template, depth_template
from graft_inference.tree import DraftTree, Source, best_chain, child_paths, merge, pooled

from .trees import CPU, VOCAB, filled_rows, lineage, matrices, random_tree, templates, token_path, tree_of, trees
from .trees import wild_scores as wild

MATRIX = number_of("matrix")


@given(trees(), st.integers(0, 5))
def test_ancestors_are_those_that_a_walk_to_the_root_meets(tree, more):
    """However far beyond the tree's own depth the bound lies."""
    found = tree.ancestors(int(tree.depths_N.max()) + more)
    expected = [[row in lineage(tree, node) for row in range(len(tree))] for node in range(len(tree))]
    assert found.tolist() == expected


@given(trees(), st.integers(0, 5))
def test_a_path_sum_is_that_of_the_nodes_that_a_walk_to_the_root_meets(tree, more):
    values_N = torch.arange(len(tree)).float()
    found = tree.path_sums(values_N, int(tree.depths_N.max()) + more)
    assert found.tolist() == [sum(lineage(tree, node)) for node in range(len(tree))]


def chosen_by_sorting(tree: DraftTree, scores: list[float], rows: int) -> list[tuple[int, int, bool]]:
    """Of each row of the result: which node it is, its parent's row, and whether it is EMPTY."""
    worth = [-math.inf if math.isnan(score) else score for score in scores]
    kept = [0, *sorted(range(1, len(tree)), key=lambda row: -worth[row])][:rows]
    found = []
    for row in kept:
        parent = int(tree.parents_N[row])
        lost = row > 0 and (parent not in kept or worth[row] == -math.inf)
        found.append((row, 0 if lost else kept.index(parent), lost))
    return found


@given(st.data(), trees(), st.integers(1, 18))
def test_what_is_chosen_is_what_sorting_chooses_whatever_the_scores_are(data, tree, rows):
    """Also where they are no numbers, and where a child scores above its parent."""
    score_N = data.draw(st.one_of(st.just(tree.logp_N), wild(len(tree))))
    pool = data.draw(st.sampled_from([tree, pooled([tree], [score_N])]))
    chosen = pool.chosen(score_N, rows)
    expected = chosen_by_sorting(tree, score_N.tolist(), rows)
    assert len(chosen) == len(expected) == min(rows, len(tree))
    for row, (node, parent, lost) in enumerate(expected):
        assert int(chosen.parents_N[row]) == parent
        assert int(chosen.tokens_N[row]) == int(tree.tokens_N[node])
        assert int(chosen.depths_N[row]) == int(tree.depths_N[node])
        assert int(chosen.paths_N[row]) == int(tree.paths_N[node])
        assert int(chosen.sources_N[row]) == (Source.EMPTY if lost else int(tree.sources_N[node]))
    may_be_accepted = [
        row for row in range(len(chosen)) if not any(expected[above][2] for above in lineage(chosen, row))
    ]
    for row in may_be_accepted:
        assert token_path(chosen, row) == token_path(tree, expected[row][0]), "below its own parent"


@given(trees(), st.integers(0, 14))
def test_the_best_nodes_come_with_all_their_parents(tree, rows):
    best = tree.best(rows)
    assert len(best) == min(1 + rows, len(tree))
    assert [float(score) for score in best.logp_N[1:]] == sorted(tree.logp_N[1:].tolist(), reverse=True)[:rows]
    assert filled_rows(best) == list(range(1, len(best)))
    assert all(best.parents_N[row] < row for row in range(1, len(best)))
    assert [best.first(2).tokens_N.tolist(), len(best.first(1))] == [best.tokens_N.tolist()[:2], 1]


def test_a_child_that_rounding_lifts_above_its_parent_does_not_hang_elsewhere():
    """Two rows: the child scores best, its parent is left out. Below the root it would be another token's path."""
    tree = random_tree(0, nodes=20)
    child = int((tree.depths_N == 2).nonzero()[0])
    score_N = torch.full((len(tree),), -5.0).index_fill(0, torch.tensor([child]), -1.0)
    chosen = tree.chosen(pooled([tree], [score_N]).logp_N, 2)
    assert chosen.tokens_N.tolist() == [int(tree.tokens_N[0]), int(tree.tokens_N[child])]
    assert chosen.sources_N.tolist() == [Source.ROOT, Source.EMPTY]


def by_rank(matrix: SuccessorMatrix, root: int, paths, noise: Noise | None = None):
    """Of every rank path its token path and log-probability; None where the matrix knows no successor."""
    found: dict[tuple[int, ...], tuple[tuple[int, ...], float] | None] = {(): ((), 0.0)}
    for path in paths:
        above, found[path] = found[path[:-1]], None
        if above is None:
            continue
        tokens, logp = above
        ranked = successors(matrix, (root, *tokens)[-1], noise, len(path))
        if path[-1] < len(ranked):
            token, step = ranked[path[-1]]
            found[path] = ((*tokens, token), logp + step)
    return [found[path] for path in paths]


def successors(matrix: SuccessorMatrix, token: int, noise: Noise | None, depth: int) -> list[tuple[int, float]]:
    """Of one token, best first, with their log-probabilities: of what they were counted, or of being drawn."""
    row = zip(matrix.ids_VK[token].tolist(), matrix.probs_VK[token].tolist(), strict=True)
    known = [(successor, max(prob, LEAST)) for successor, prob in row if successor >= 0]
    if noise is None:
        return [(successor, math.log(prob)) for successor, prob in known]
    drawn = {one: math.log(prob) / noise.temperature + float(noise.gumbel_PV[depth - 1, one]) for one, prob in known}
    counted = sum(prob for prob in matrix.probs_VK[token].tolist())
    rest = math.log(max(1 - counted, LEAST)) + MEAN_GUMBEL
    total = math.log(sum(math.exp(score) for score in (*drawn.values(), rest)))
    return [(one, drawn[one] - total) for one in sorted(drawn, key=lambda one: -drawn[one])]


NOISE = Noise(gumbel(3, 0, 14, VOCAB, CPU), 0.7)


@given(matrices(), templates(), st.integers(0, VOCAB - 1), st.sampled_from([None, NOISE]))
def test_a_template_is_looked_up_as_a_walk_along_each_rank_path_does(matrix, paths, root, noise):
    tree = matrix.expand(torch.tensor([root]), Template(paths, CPU, MATRIX), noise)
    assert (len(tree), int(tree.tokens_N[0]), int(tree.sources_N[0])) == (1 + len(paths), root, Source.ROOT)
    rows = {(): 0} | {path: row for row, path in enumerate(paths, 1)}
    for path, expected in zip(paths, by_rank(matrix, root, paths, noise), strict=True):
        row = rows[path]
        assert (int(tree.depths_N[row]), int(tree.parents_N[row])) == (len(path), rows[path[:-1]])
        if expected is None:
            assert (int(tree.sources_N[row]), float(tree.logp_N[row])) == (Source.EMPTY, -math.inf)
            continue
        tokens, logp = expected
        assert (token_path(tree, row), int(tree.sources_N[row])) == (tokens, MATRIX)
        assert float(tree.logp_N[row]) == pytest.approx(logp, abs=1e-3)
        assert int(tree.paths_N[row]) == int(child_paths(tree.paths_N[tree.parents_N[row]], tree.tokens_N[row]))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 4))
def test_a_template_by_depth_has_the_likeliest_paths_of_each(counts, max_rank):
    template = depth_template(tuple(counts), max_rank)
    check_template(template, "it")
    assert list(template) == sorted(template, key=lambda path: (len(path) + sum(path), path))
    parents = [()]
    for depth, count in enumerate(counts, 1):
        children = [(*parent, rank) for parent in parents for rank in range(max_rank + 1)]
        parents = [path for path in template if len(path) == depth]
        assert len(parents) == min(count, len(children))
        assert set(parents) <= set(children)
        left_out = [sum(path) for path in children if path not in parents]
        assert not parents or not left_out or max(map(sum, parents)) <= min(left_out)


@st.composite
def candidates(draw) -> tuple[DraftTree, DraftTree]:
    """A drafted and a retrieved tree of one root, which often name the same paths; both scored."""
    drafted, matrix = draw(trees(most=9)), draw(matrices())
    retrieved = matrix.expand(drafted.tokens_N[:1], Template(draw(templates()), CPU, MATRIX))
    # As a scorer leaves them: falling from parent to child, between the drafted nodes' own.
    logp_N = draw(st.sampled_from([-0.125, -0.625, -1.5])) * retrieved.depths_N
    return drafted, replace(retrieved, logp_N=torch.where(retrieved.sources_N >= 0, logp_N, -torch.inf))


@given(candidates(), st.integers(0, 8))
def test_merge_equals_a_trie(both, rows):
    drafted, retrieved = both
    tree = merge(drafted, retrieved, rows)
    have = {token_path(drafted, row) for row in range(1, len(drafted))}
    proposed = [token_path(retrieved, row) for row in filled_rows(retrieved)]
    new = [path for path in proposed if path not in have][:rows]
    assert len(tree) == len(drafted) + rows, "the budget is fixed"
    paths = [token_path(tree, row) for row in filled_rows(tree)]
    assert paths == [token_path(drafted, row) for row in range(1, len(drafted))] + new
    assert len(set(paths)) == len(paths), "no two siblings share a token"
    for row in filled_rows(tree):
        assert tree.parents_N[row] < row
        assert tree.depths_N[row] == len(token_path(tree, row))
        assert tree.sources_N[row] == (Source.DRAFTED if row < len(drafted) else MATRIX)
        assert tree.paths_N[row] == child_paths(tree.paths_N[tree.parents_N[row]], tree.tokens_N[row])


def test_merge_refills_the_rows_of_duplicates():
    """Root 0; drafted child 1. The matrix offers 1 first: its row goes to the next path."""
    drafted = tree_of([0, 1], [0, 0], [0.0, -0.5])
    matrix = SuccessorMatrix(torch.tensor([[1, 2], [3, 4], [5, 6], [0, 0], [0, 0], [0, 0], [0, 0]], dtype=torch.int32))
    template = Template([(0,), (1,), (0, 0)], CPU, MATRIX)
    tree = merge(drafted, matrix.expand(torch.tensor([0]), template), rows=2)
    assert tree.tokens_N.tolist() == [0, 1, 2, 3]
    assert tree.parents_N.tolist() == [0, 0, 0, 1], "3 hangs under the drafted twin of the retrieved 1"


@given(candidates(), st.integers(1, 20))
def test_the_best_of_a_pool_equal_a_sorted_trie(both, rows):
    """Of every path its best score, of all paths the best; duplicates free their rows."""
    pool = pooled(list(both), [tree.logp_N for tree in both])
    tree = pool.chosen(pool.logp_N, rows)
    best: dict[tuple[int, ...], tuple[float, int]] = {}
    for source in both:
        for row in filled_rows(source):
            path, score = token_path(source, row), float(source.logp_N[row])
            known = best.get(path, (-torch.inf, int(source.sources_N[row])))
            best[path] = (max(score, known[0]), known[1])
    kept = filled_rows(tree)
    assert tree.logp_N[kept].tolist() == sorted((score for score, _ in best.values()), reverse=True)[: rows - 1]
    paths = [token_path(tree, row) for row in kept]
    assert len(set(paths)) == len(paths), "no two siblings share a token"
    for row, path in zip(kept, paths, strict=True):
        assert best[path] == (float(tree.logp_N[row]), int(tree.sources_N[row]))
        assert tree.parents_N[row] < row
        assert tree.depths_N[row] == len(path)


def test_a_pool_by_hand():
    """Root 0, drafted 1 (-0.5) and 2 (-0.9); retrieved 2 (-0.2), 2 3 (-0.4) and 4 (-1). Five rows: 4 is left out."""
    drafted = tree_of([0, 1, 2], [0, 0, 0], [0.0, -0.5, -0.9])
    retrieved = tree_of([0, 2, 3, 4], [0, 0, 1, 0], [0.0, -0.2, -0.4, -1.0], [Source.ROOT, MATRIX, MATRIX, MATRIX])
    pool = pooled([drafted, retrieved], [drafted.logp_N, retrieved.logp_N])
    best = pool.chosen(pool.logp_N, 4)
    assert best.tokens_N.tolist() == [0, 2, 3, 1]
    assert best.parents_N.tolist() == [0, 0, 1, 0]
    assert best.sources_N.tolist() == [Source.ROOT, Source.DRAFTED, MATRIX, Source.DRAFTED]
    assert best.logp_N.tolist() == pytest.approx([0.0, -0.2, -0.4, -0.5])


@given(candidates(), st.integers(1, 10), st.integers(0, 4))
def test_the_best_chain_is_the_best_of_all_paths(both, rows, more):
    """The most expected accepted nodes within `rows - 1` tokens, the nodes one after the other."""
    pool = pooled(list(both), [tree.logp_N for tree in both])
    chain = best_chain(pool, int(pool.depths_N.max()) + more, rows)
    found = [row for row in range(1, len(pool)) if pool.logp_N[row] > -torch.inf]
    expected = {
        token_path(pool, row): sum(float(pool.logp_N[above].exp()) for above in lineage(pool, row)[:-1])
        for row in found
        if pool.depths_N[row] < rows
    }
    kept = filled_rows(chain)
    assert len(chain) == min(rows, len(pool))
    assert kept == list(range(1, 1 + len(kept))), "what pads the chain stands behind it"
    assert chain.parents_N[kept].tolist() == list(range(len(kept))), "one after the other"
    best = max(expected.values(), default=0.0)
    assert float(chain.logp_N[kept].exp().sum()) == pytest.approx(best, abs=1e-5)
    assert not kept or expected[tuple(chain.tokens_N[kept].tolist())] == pytest.approx(best, abs=1e-5)


def test_a_chain_of_nothing_is_the_root():
    tree = random_tree(0, nodes=5)
    nothing = torch.full_like(tree.logp_N, -torch.inf).index_fill(0, torch.tensor([0]), 0.0)
    chain = best_chain(pooled([tree], [nothing]), max_depth=5, rows=3)
    assert chain.sources_N.tolist() == [Source.ROOT, Source.EMPTY, Source.EMPTY]


def on_meta(tree: DraftTree) -> DraftTree:
    return DraftTree(*(getattr(tree, column.name).to("meta") for column in fields(tree)))


def test_the_algebra_makes_no_tensor_on_another_device():
    """Shown on the device without memory, which refuses what lies on the CPU, as a GPU does."""
    drafted, retrieved = on_meta(random_tree(0, 7)), on_meta(random_tree(1, 9))
    pool = pooled([drafted, retrieved], [drafted.logp_N, retrieved.logp_N])
    trees = [merge(drafted, retrieved, 3), pool.chosen(pool.logp_N, 8), best_chain(pool, 5, 4), drafted.best(3)]
    assert [len(tree) for tree in trees] == [10, 8, 4, 4]
    assert all(getattr(tree, column.name).is_meta for tree in trees for column in fields(tree))
    assert drafted.ancestors(4).is_meta

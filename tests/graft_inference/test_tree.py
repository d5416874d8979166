"""Tree algebra against plain references over Python dictionaries."""

import pytest
import torch

from graft_inference.retrieval.sources import number_of
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.template import Template
from graft_inference.tree import DraftTree, Source, best_chain, child_paths, merge, pooled, root_tree

MATRIX = number_of("matrix")
PATHS = ((0,), (1,), (0, 0), (2,), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (1, 0, 0))


def random_tree(seed: int, nodes: int = 14, vocab: int = 5) -> DraftTree:
    """A drafted tree over few tokens, so that paths of several trees coincide; siblings differ."""
    generator = torch.Generator().manual_seed(seed)
    tokens, parents, depths, logp, taken = [2], [0], [0], [0.0], {}
    while len(tokens) < nodes:
        parent = int(torch.randint(len(tokens), (1,), generator=generator))
        token = int(torch.randint(vocab, (1,), generator=generator))
        if token in taken.setdefault(parent, set()):
            continue
        taken[parent].add(token)
        tokens.append(token)
        parents.append(parent)
        depths.append(depths[parent] + 1)
        logp.append(logp[parent] - float(torch.rand(1, generator=generator)))
    tree = DraftTree(
        torch.tensor(tokens),
        torch.tensor(parents),
        torch.tensor(depths),
        torch.tensor(logp),
        torch.tensor([Source.ROOT] + [Source.DRAFTED] * (nodes - 1)),
        torch.zeros(nodes, dtype=torch.long),
    )
    for row in range(1, nodes):
        tree.paths_N[row] = child_paths(tree.paths_N[parents[row]], tree.tokens_N[row])
    return tree


def token_path(tree: DraftTree, row: int) -> tuple[int, ...]:
    path: list[int] = []
    while row:
        path.insert(0, int(tree.tokens_N[row]))
        row = int(tree.parents_N[row])
    return tuple(path)


def filled_rows(tree: DraftTree) -> list[int]:
    return [row for row in range(1, len(tree)) if tree.sources_N[row] != Source.EMPTY]


@pytest.mark.parametrize("seed", range(5))
def test_ancestors_equal_a_walk_to_the_root(seed):
    tree = random_tree(seed)
    expected = torch.zeros(len(tree), len(tree), dtype=torch.bool)
    for row in range(len(tree)):
        expected[row, 0] = True
        node = row
        while node:
            expected[row, node] = True
            node = int(tree.parents_N[node])
    assert torch.equal(tree.ancestors(int(tree.depths_N.max())), expected)


@pytest.mark.parametrize("seed", range(5))
def test_best_keeps_the_highest_scores_and_every_parent(seed):
    tree = random_tree(seed)
    best = tree.best(6)
    by_score = sorted(range(1, len(tree)), key=lambda row: -float(tree.logp_N[row]))[:6]
    assert {token_path(best, row) for row in range(1, 7)} == {token_path(tree, row) for row in by_score}
    assert all(best.parents_N[row] < row for row in range(1, 7))


def test_best_keeps_parents_first_on_equal_scores():
    tree = random_tree(0)
    tree.logp_N = torch.zeros_like(tree.logp_N)
    best = tree.best(4)
    assert best.tokens_N.tolist() == tree.tokens_N[:5].tolist()


def reference_expansion(ids, root, paths):
    """Token path of every rank path, None where the matrix knows no successor."""
    out = {(): ()}
    for path in paths:
        parent = out[path[:-1]]
        token = -1
        if parent is not None:
            token = ids[parent[-1] if parent else root][path[-1]]
        out[path] = None if parent is None or token < 0 else (*parent, token)
    return [out[path] for path in paths]


def random_matrix(seed: int, vocab: int = 5) -> SuccessorMatrix:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(vocab, vocab, generator=generator).argsort(dim=1)[:, :3].to(torch.int32)
    ids[1, 2] = -1
    ids[3, 1:] = -1
    return SuccessorMatrix(ids)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rows", [0, 3, 7])
def test_merge_equals_a_trie(seed, rows):
    drafted, matrix = random_tree(seed, nodes=7), random_matrix(seed)
    retrieved = matrix.expand(drafted.tokens_N[:1], Template(list(PATHS), torch.device("cpu"), MATRIX))
    tree = merge(drafted, retrieved, rows)

    have = {token_path(drafted, row) for row in range(1, len(drafted))}
    proposed = reference_expansion(matrix.ids_VK.tolist(), int(drafted.tokens_N[0]), PATHS)
    new = [path for path in proposed if path is not None and path not in have][:rows]

    assert len(tree) == len(drafted) + rows, "the budget is fixed"
    paths = [token_path(tree, row) for row in filled_rows(tree)]
    assert paths == [token_path(drafted, row) for row in range(1, len(drafted))] + new
    assert len(set(paths)) == len(paths), "no two siblings share a token"
    for row in filled_rows(tree):
        assert tree.parents_N[row] < row
        assert tree.depths_N[row] == len(token_path(tree, row))
        assert tree.sources_N[row] == (Source.DRAFTED if row < len(drafted) else MATRIX)


def test_merge_refills_the_rows_of_duplicates():
    """Root 0; drafted child 1. The matrix offers 1 first: its row goes to the next path."""
    drafted = root_tree(torch.tensor([0]))
    drafted = DraftTree(
        torch.tensor([0, 1]),
        torch.tensor([0, 0]),
        torch.tensor([0, 1]),
        torch.tensor([0.0, -0.5]),
        torch.tensor([Source.ROOT, Source.DRAFTED]),
        torch.stack((torch.tensor(0), child_paths(torch.tensor(0), torch.tensor(1)))),
    )
    matrix = SuccessorMatrix(torch.tensor([[1, 2], [3, 4], [5, 6], [0, 0], [0, 0], [0, 0], [0, 0]], dtype=torch.int32))
    template = Template([(0,), (1,), (0, 0)], torch.device("cpu"), MATRIX)
    tree = merge(drafted, matrix.expand(torch.tensor([0]), template), rows=2)
    assert tree.tokens_N.tolist() == [0, 1, 2, 3]
    assert tree.parents_N.tolist() == [0, 0, 0, 1], "3 hangs under the drafted twin of the retrieved 1"


def random_candidates(seed: int, nodes: int) -> tuple[DraftTree, DraftTree]:
    """A drafted and a retrieved tree of one root, both scored."""
    drafted, matrix = random_tree(seed, nodes=nodes), random_matrix(seed)
    retrieved = matrix.expand(drafted.tokens_N[:1], Template(list(PATHS), torch.device("cpu"), MATRIX))
    # A score that falls from parent to child, and ranks between the drafted nodes' own.
    retrieved.logp_N = torch.where(retrieved.sources_N >= 0, -0.37 * retrieved.depths_N, -torch.inf)
    return drafted, retrieved


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rows", [1, 4, 9, 16])
def test_the_best_of_a_pool_equal_a_sorted_trie(seed, rows):
    """Of every path its best score, of all paths the best; duplicates free their rows."""
    drafted, retrieved = random_candidates(seed, nodes=7)
    pool = pooled([drafted, retrieved], [drafted.logp_N, retrieved.logp_N])
    tree = pool.chosen(pool.logp_N, rows)

    best: dict[tuple[int, ...], tuple[float, int]] = {}
    for source in (drafted, retrieved):
        for row in filled_rows(source):
            path, score = token_path(source, row), float(source.logp_N[row])
            first = best.get(path, (-torch.inf, int(source.sources_N[row])))
            best[path] = (max(score, first[0]), first[1])
    expected = sorted((score for score, _ in best.values()), reverse=True)[: rows - 1]
    kept = filled_rows(tree)
    assert len(tree) == rows
    assert [float(tree.logp_N[row]) for row in kept] == pytest.approx(expected)
    paths = [token_path(tree, row) for row in kept]
    assert len(set(paths)) == len(paths), "no two siblings share a token"
    for row, path in zip(kept, paths, strict=True):
        assert best[path] == (pytest.approx(float(tree.logp_N[row])), int(tree.sources_N[row]))
        assert tree.parents_N[row] < row
        assert tree.depths_N[row] == len(path)


def test_a_pool_by_hand():
    """Root 0, drafted 1 (-0.5) and 2 (-0.9); retrieved 2 (-0.2), 2 3 (-0.4) and 4 (-1). Five rows: 4 is left out."""

    def tree(tokens, parents, depths, logp, source):
        paths = [0]
        for token, parent in zip(tokens[1:], parents[1:], strict=True):
            paths.append(int(child_paths(torch.tensor(paths[parent]), torch.tensor(token))))
        sources = [Source.ROOT] + [source] * (len(tokens) - 1)
        columns = [torch.tensor(column) for column in (tokens, parents, depths)]
        return DraftTree(*columns, torch.tensor(logp), torch.tensor(sources), torch.tensor(paths))

    drafted = tree([0, 1, 2], [0, 0, 0], [0, 1, 1], [0.0, -0.5, -0.9], Source.DRAFTED)
    retrieved = tree([0, 2, 3, 4], [0, 0, 1, 0], [0, 1, 2, 1], [0.0, -0.2, -0.4, -1.0], MATRIX)
    pool = pooled([drafted, retrieved], [drafted.logp_N, retrieved.logp_N])
    best = pool.chosen(pool.logp_N, 4)
    assert best.tokens_N.tolist() == [0, 2, 3, 1]
    assert best.parents_N.tolist() == [0, 0, 1, 0]
    assert best.sources_N.tolist() == [Source.ROOT, Source.DRAFTED, MATRIX, Source.DRAFTED]
    assert best.logp_N.tolist() == pytest.approx([0.0, -0.2, -0.4, -0.5])
    assert best.first(2).tokens_N.tolist() == [0, 2]


def reference_best_path(pool: DraftTree, most: int) -> tuple[tuple[int, ...], float]:
    """Every path that the pool holds, one after the other: the most expected accepted nodes within `most` tokens."""
    best = ((), 0.0)
    for row in filled_rows(pool):
        place, expected = row, 0.0
        while place:
            expected += float(pool.logp_N[place].exp())
            place = int(pool.parents_N[place])
        if pool.logp_N[row] > -torch.inf and pool.depths_N[row] <= most and expected > best[1] + 1e-6:
            best = (token_path(pool, row), expected)
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rows", [1, 2, 4, 9])
def test_the_best_chain_equals_a_search_of_all_paths(seed, rows):
    drafted, retrieved = random_candidates(seed, nodes=9)
    pool = pooled([drafted, retrieved], [drafted.logp_N, retrieved.logp_N])
    chain = best_chain(pool, max_depth=9, rows=rows)
    path, expected = reference_best_path(pool, rows - 1)
    kept = filled_rows(chain)
    assert len(chain) == rows
    assert tuple(chain.tokens_N[kept].tolist()) == path
    assert chain.parents_N[kept].tolist() == list(range(len(path))), "one after the other"
    assert float(chain.logp_N[kept].exp().sum()) == pytest.approx(expected)


def test_a_chain_of_nothing_is_the_root():
    tree = random_tree(0, nodes=5)
    nothing = torch.full_like(tree.logp_N, -torch.inf).index_fill(0, torch.tensor([0]), 0.0)
    chain = best_chain(pooled([tree], [nothing]), max_depth=5, rows=3)
    assert chain.sources_N.tolist() == [Source.ROOT, Source.EMPTY, Source.EMPTY]

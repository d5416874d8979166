"""Draft trees: made by hand, drawn by Hypothesis, and read as the token paths that they are."""

import math

import torch
from hypothesis import strategies as st

from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.tree import PATH_BASE, DraftTree, Source

CPU = torch.device("cpu")
VOCAB = 5
"""So few tokens that paths of several trees coincide."""
FALLS = (0.0, 0.25, 0.5, 1.0, 2.0)
"""From parent to child: scores are equal now and then, and their sums exact."""


def tree_of(tokens, parents, logp=None, sources=None) -> DraftTree:
    """A tree whose other columns follow by plain loops; EMPTY rows have depth 0, as the builders leave them."""
    sources = sources or [Source.ROOT] + [Source.DRAFTED] * (len(tokens) - 1)
    depths, keys = [0], [0]
    for token, parent, source in zip(tokens[1:], parents[1:], sources[1:], strict=True):
        depths.append(0 if source == Source.EMPTY else depths[parent] + 1)
        key = keys[parent] * PATH_BASE + token + 1
        keys.append((key + 2**63) % 2**64 - 2**63)
    columns = [torch.tensor(column) for column in (tokens, parents, depths)]
    scores = torch.tensor(logp or [0.0] * len(tokens), dtype=torch.float32)
    return DraftTree(*columns, scores, torch.tensor(list(map(int, sources))), torch.tensor(keys))


def random_tree(seed: int, nodes: int = 14) -> DraftTree:
    """A drafted tree of so many nodes for tests that need just one."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(60, (400, 2), generator=generator).tolist()
    falls = torch.rand(400, generator=generator).tolist()
    return _grown(2, pairs, falls, nodes)


def _grown(root: int, pairs, falls, nodes: int) -> DraftTree:
    """Hangs a token below a node for each pair, but none twice below one node."""
    tokens, parents, logp, taken = [root], [0], [0.0], set()
    for (place, number), fall in zip(pairs, falls, strict=True):
        parent, token = place % len(tokens), number % VOCAB
        if (parent, token) not in taken and len(tokens) < nodes:
            taken.add((parent, token))
            tokens.append(token)
            parents.append(parent)
            logp.append(logp[parent] - fall)
    return tree_of(tokens, parents, logp)


@st.composite
def trees(draw, most: int = 14, root: int | None = None) -> DraftTree:
    """A drafted tree; siblings differ in their tokens, and no child scores above its parent."""
    root = draw(st.integers(0, VOCAB - 1)) if root is None else root
    pair = st.tuples(st.integers(0, 59), st.integers(0, VOCAB - 1))
    grown = draw(st.lists(st.tuples(pair, st.sampled_from(FALLS)), max_size=most - 1))
    return _grown(root, [pair for pair, _ in grown], [fall for _, fall in grown], most)


@st.composite
def templates(draw, most: int = 12, ranks: int = 3, root_alone: bool = True) -> tuple[tuple[int, ...], ...]:
    """Rank paths in any order that has each parent before its children."""
    pairs = draw(st.lists(st.tuples(st.integers(0, 59), st.integers(0, ranks - 1)), max_size=most))
    paths: list[tuple[int, ...]] = [()]
    for place, rank in pairs:
        path = (*paths[place % len(paths)], rank)
        if path not in paths:
            paths.append(path)
    return tuple(paths[1:]) or (() if root_alone else ((0,),))


@st.composite
def matrices(draw, vocab: int = VOCAB, k: int = 3) -> SuccessorMatrix:
    """Distinct successors of every token, of some fewer than k, with falling probabilities that may be zero."""
    ids_VK, probs_VK = torch.full((vocab, k), -1, dtype=torch.int32), torch.zeros(vocab, k)
    for token in range(vocab):
        row = draw(st.permutations(range(vocab)))[: draw(st.integers(0, k))]
        parts = sorted(draw(st.lists(st.integers(0, 20), min_size=len(row), max_size=len(row))), reverse=True)
        ids_VK[token, : len(row)] = torch.tensor(row, dtype=torch.int32)
        probs_VK[token, : len(row)] = torch.tensor(parts) / (sum(parts) + draw(st.integers(1, 9)))
    return SuccessorMatrix(ids_VK, probs_VK.half())


def wild_scores(count: int) -> st.SearchStrategy:
    """Scores that no head should give."""
    wild = st.sampled_from([math.nan, math.inf, -math.inf, 3.0, 0.0, -0.0, -1e-30, -1.0, -2.0])
    return st.lists(wild, min_size=count, max_size=count).map(torch.tensor)


def token_path(tree: DraftTree, row: int) -> tuple[int, ...]:
    path: list[int] = []
    while row:
        path.insert(0, int(tree.tokens_N[row]))
        row = int(tree.parents_N[row])
    return tuple(path)


def lineage(tree: DraftTree, row: int) -> list[int]:
    """A row and all rows above it, the root last."""
    rows = [row]
    while rows[-1]:
        rows.append(int(tree.parents_N[rows[-1]]))
    return rows


def filled_rows(tree: DraftTree) -> list[int]:
    return [row for row in range(1, len(tree)) if tree.sources_N[row] != Source.EMPTY]

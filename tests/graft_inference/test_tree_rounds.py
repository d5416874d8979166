"""Rounds of trees for other engines make just the trees that our own engine makes, all of one size."""

from dataclasses import dataclass, replace

import pytest
import torch

from graft_inference import Checkpoint, GraftError
from graft_inference.integrations.trees import Shape, TreeRounds, VerifiedTrees, drafted_trees
from graft_inference.tree import DraftTree, Source

from .test_chain_rounds import EVERYTHING, recorded_rounds, write_plan
from .tiny import learned_plan, tiny_engine, tiny_head, tiny_model
from .tiny_bundle import tiny_tokenizer, write_bundle, write_target

TOPK, STEPS, NODES = 3, 4, 12
ONE_SIZE = replace(learned_plan(), checkpoints=(Checkpoint(STEPS, num_draft_tokens=NODES),))
SHAPE = Shape(TOPK, STEPS, NODES)


@dataclass
class Lists:
    """What a head said in each step, and the lists that EAGLE's code makes of it."""

    said: list[tuple[torch.Tensor, torch.Tensor]]
    tokens_BC: torch.Tensor
    probabilities_BC: torch.Tensor
    expanded_BG: torch.Tensor
    paths: list[list[tuple[int, ...]]]
    """Of each request and candidate, the tokens from below the root to it."""


def eagle_lists(batch: int, topk: int, steps: int, vocab: int, generator: torch.Generator) -> Lists:
    """EAGLE's beam, candidate by candidate: every step expands the topk likeliest paths of the one before."""
    said = []
    for step in range(steps):
        rows = batch * (topk if step else 1)
        p = torch.rand(rows, vocab, generator=generator).softmax(dim=1).topk(topk)
        said.append((p.values, p.indices))
    tokens, probabilities, expanded, paths = [], [], [], []
    for request in range(batch):
        beam, known, groups = [(1.0, (), -1)], [], [-1]
        for step, (p, ids) in enumerate(said):
            new = []
            for place, (probability, path, _) in enumerate(beam):
                row = request * topk + place if step else request
                for child in range(topk):
                    new.append(
                        (probability * float(p[row, child]), (*path, int(ids[row, child])), len(known) + len(new))
                    )
            known += new
            beam = sorted(new, key=lambda one: -one[0])[:topk] if step else new
            groups += [number for _, _, number in beam]
        tokens.append([path[-1] for _, path, _ in known])
        probabilities.append([probability for probability, _, _ in known])
        expanded.append(groups)
        paths.append([path for _, path, _ in known])
    return Lists(said, torch.tensor(tokens), torch.tensor(probabilities), torch.tensor(expanded), paths)


def walk(tokens: list[int], child: list[int], sibling: list[int]) -> dict[int, tuple[int, ...]]:
    """By node that a verifier reaches: the tokens from below the root to it."""
    found, open_nodes = {0: ()}, [0]
    while open_nodes:
        node = open_nodes.pop()
        below = child[node]
        while below != -1:
            assert below not in found
            found[below] = (*found[node], tokens[below])
            open_nodes.append(below)
            below = sibling[below]
    return found


def reached(trees: VerifiedTrees, row: int) -> dict[int, tuple[int, ...]]:
    return walk(*(column[row].tolist() for column in (trees.tokens_BN, trees.child_BN, trees.sibling_BN)))


def paths_of(trees: VerifiedTrees, row: int) -> set[tuple[int, ...]]:
    return set(reached(trees, row).values())


def tree_paths(tree: DraftTree) -> set[tuple[int, ...]]:
    """By the parents of the nodes that are not EMPTY."""
    paths = {0: ()}
    for node in range(1, len(tree)):
        if tree.sources_N[node] > Source.ROOT:
            paths[node] = (*paths[int(tree.parents_N[node])], int(tree.tokens_N[node]))
    return set(paths.values())


@pytest.mark.parametrize(("topk", "steps"), [(2, 1), (3, 2), (3, 4), (1, 3)])
def test_the_lists_of_eagle_are_the_trees_they_were_made_of(topk, steps):
    lists = eagle_lists(2, topk, steps, 11, torch.Generator().manual_seed(0))
    roots_B = torch.tensor([4, 7])
    trees = drafted_trees(roots_B, lists.tokens_BC, lists.probabilities_BC, lists.expanded_BG, topk)
    for tree, root, paths, probability_C in zip(trees, roots_B, lists.paths, lists.probabilities_BC, strict=True):
        assert (int(tree.tokens_N[0]), int(tree.parents_N[0]), int(tree.sources_N[0])) == (root, 0, Source.ROOT)
        assert tree.depths_N.tolist() == [0, *map(len, paths)]
        torch.testing.assert_close(tree.logp_N[1:].exp(), probability_C)
        for node, path in enumerate(paths, start=1):
            up, seen = node, []
            while up:
                seen.insert(0, int(tree.tokens_N[up]))
                up = int(tree.parents_N[up])
            assert tuple(seen) == path
        assert len(tree.paths_N.unique()) == len(set(paths)) + 1


@pytest.fixture(scope="module")
def engine():
    model = tiny_model("llama", vocab_size=16)
    engine = tiny_engine(model, head=tiny_head(model, draft_vocab_size=12))
    engine.retrieval_scope = "frozen"
    return engine


def test_a_round_chooses_the_tree_that_the_engine_chooses(engine, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 16, (length,), generator=generator).repeat(2) for length in (5, 9, 14)]
    found = recorded_rounds(engine, prompts, ONE_SIZE, monkeypatch)
    texts = [text_S for (text_S,), _, _ in found]
    trees = TreeRounds(ONE_SIZE, {"matrix": engine.successors}, SHAPE).trees(
        texts, [drafted for _, [(_, drafted)], _ in found]
    )
    assert trees.tokens_BN.shape == (len(found), NODES)
    sources = set()
    for row, (text_S, (_, _, [(_, tree)])) in enumerate(zip(texts, found, strict=True)):
        assert trees.tokens_BN[row, 0] == text_S[-1]
        assert paths_of(trees, row) == tree_paths(tree)
        for node, path in reached(trees, row).items():
            assert trees.depths_BN[row, node] == len(path)
            seen = [int(one) for one in trees.ancestors_BNN[row, node].nonzero()]
            assert [int(trees.tokens_BN[row, one]) for one in seen[1:]] == list(path)
            assert (seen[0], seen[-1]) == (0, node)
        sources |= set(tree.sources_N.tolist())
    assert sources > {Source.ROOT, Source.DRAFTED}  # retrieval has its part


def test_what_only_fills_a_tree_up_is_never_reached():
    plan = replace(ONE_SIZE, acceptance=replace(ONE_SIZE.acceptance, sources=ONE_SIZE.acceptance.sources[1:]))
    lists = eagle_lists(1, 2, 2, 61, torch.Generator().manual_seed(0))
    drafted = drafted_trees(torch.tensor([3]), lists.tokens_BC, lists.probabilities_BC, lists.expanded_BG, 2)
    # Nothing repeats in this text, so that lookup finds nothing: 6 drafted nodes, and 5 places to look up.
    trees = TreeRounds(plan, {}, Shape(2, 2, 12)).trees([torch.tensor([1, 2, 3])], drafted)
    assert trees.tokens_BN.shape == (1, 12)
    assert paths_of(trees, 0) == {(), *lists.paths[0]}
    assert trees.ancestors_BNN[0].sum(dim=1).tolist()[7:] == [2] * 5  # themselves, and the root
    assert trees.depths_BN[0, 7:].tolist() == [1] * 5


@pytest.fixture
def bundle(tmp_path):
    """A bundle of trees, and the configuration of its target."""
    directory = write_bundle(tmp_path / "bundle", write_target(tmp_path / "target"))
    write_plan(directory, learned_plan())
    return str(directory), tiny_model("llama").config


def test_a_bundle_of_trees_is_read(bundle):
    directory, config = bundle
    rounds = TreeRounds.of_bundle(directory, config, tiny_tokenizer(), Shape(4, 3, 16))
    lists = eagle_lists(1, 4, 3, 61, torch.Generator().manual_seed(0))
    drafted = drafted_trees(torch.tensor([3]), lists.tokens_BC, lists.probabilities_BC, lists.expanded_BG, 4)
    assert rounds.trees([torch.tensor([1, 2, 3])], drafted).tokens_BN.shape == (1, 16)


def test_a_bundle_that_does_not_fit_is_refused(bundle, tmp_path):
    directory, config = bundle
    with pytest.raises(GraftError, match="the acceptance model knows 4 drafted depths, the plan 5"):
        TreeRounds.of_bundle(directory, config, None, Shape(3, 5, 12))
    with pytest.raises(GraftError, match="has 99 nodes, but there are only"):
        TreeRounds.of_bundle(directory, config, None, Shape(3, 4, 99))
    with pytest.raises(GraftError, match="tokenizer is not the one"):
        TreeRounds.of_bundle(directory, config, tiny_tokenizer("<end>"), SHAPE)
    with pytest.raises(GraftError, match="wants a target with vocab_size"):
        TreeRounds.of_bundle(directory, tiny_model("llama", vocab_size=8).config, None, SHAPE)
    for plan in (EVERYTHING, learned_plan().without_drafting()):
        write_plan(tmp_path / "bundle", plan)
        with pytest.raises(GraftError, match=r"does not score the nodes of trees .*policy\.kind=learned"):
            TreeRounds.of_bundle(directory, config, None, SHAPE)
    (tmp_path / "bundle" / "graft.json").unlink()
    with pytest.raises(GraftError, match="a head without a policy"):
        TreeRounds.of_bundle(directory, config, None, SHAPE)

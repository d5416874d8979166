"""Which nodes a plan's builder verifies, and their scores, against the rules written out over token paths."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft_inference import AcceptanceModel, Checkpoint, QuotaCheckpoint, QuotaPlan, ScoredPlan, SourceModel
from graft_inference.noise import LEAST, Noise, gumbel
from graft_inference.policy.acceptance import LEAST as LEAST_SURE
from graft_inference.policy.plan import ChainPlan
from graft_inference.policy.tree_builder import builder_of
from graft_inference.retrieval.prompt_lookup import LONGEST, PromptLookup
from graft_inference.retrieval.sources import number_of
from graft_inference.retrieval.successor_matrix import MatrixSource, SuccessorMatrix
from graft_inference.template import chain
from graft_inference.tree import DraftTree, Source

from .test_prompt_lookup import walked
from .test_tree import by_rank
from .tiny import learned_plan
from .trees import CPU, VOCAB, filled_rows, lineage, matrices, templates, token_path, tree_of, trees

NUMBERS = st.sampled_from([-1.5, -0.25, 0.0, 0.5, 2.0])
STEPS = 13
"""As deep as any drawn tree."""
SCALES = st.lists(st.tuples(st.sampled_from([0.5, 1.0, 2.0]), NUMBERS), min_size=STEPS, max_size=STEPS).map(tuple)


def accepted(slope: float, offset: float, logp: float) -> float:
    """log sigmoid(slope * logit(q) + offset), q not nearer than LEAST to 0 or 1."""
    q = min(max(math.exp(logp), LEAST_SURE), 1 - LEAST_SURE)
    return -math.log1p(math.exp(-(slope * math.log(q / (1 - q)) + offset)))


def row_of(numbers: int) -> st.SearchStrategy:
    return st.lists(NUMBERS, min_size=numbers, max_size=numbers).map(tuple)


@st.composite
def models(draw) -> AcceptanceModel:
    """Both sources, one of them, or none; in either order."""
    template = draw(templates(root_alone=False))
    depth = max(map(len, template))
    slopes = draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=depth, max_size=depth).map(tuple))
    matrix = SourceModel("matrix", template, slopes, (draw(row_of(depth)),), draw(row_of(3)))
    length = draw(st.integers(1, 4))
    kinds = tuple(draw(row_of(length)) for _ in range(LONGEST))
    lookup = SourceModel("lookup", chain(length), (), kinds, draw(row_of(1)))
    sources = draw(st.sampled_from([(), (matrix,), (lookup,), (matrix, lookup), (lookup, matrix)]))
    return AcceptanceModel(draw(SCALES), sources)


@st.composite
def rounds(draw):
    """What the sources know, the head's proposals below one root, and an acceptance model."""
    text = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20))
    lookup = PromptLookup(24, CPU)
    lookup.extend(torch.tensor(text))
    matrix = draw(matrices())
    drafted = draw(trees(most=9, root=text[-1]))
    sources = {"matrix": MatrixSource(matrix), "lookup": lookup}
    return text, sources, drafted, draw(models())


def scored_paths(text, sources, drafted: DraftTree, model: AcceptanceModel, noise=None):
    """log P(accepted) of every candidate's token path, and its source: the best score and the first source."""
    found: dict[tuple[int, ...], tuple[float, int]] = {}

    def add(path, score, number):
        best, first = found.get(path, (-math.inf, number))
        found[path] = max(best, score), first

    for row in range(1, len(drafted)):
        score = sum(
            accepted(
                *model.drafted[int(drafted.depths_N[node]) - 1], float(drafted.logp_N[node] - drafted.logp_N[parent])
            )
            for node, parent in zip(lineage(drafted, row), lineage(drafted, row)[1:], strict=False)
        )
        add(token_path(drafted, row), score, Source.DRAFTED)
    for source in model.sources:
        ranked = _retrieved(text, sources, source, noise)
        for path in source.template:
            if ranked[path] is None:
                continue
            score = 0.0
            for depth in range(1, len(path) + 1):
                offset = source.ranks[path[depth - 1]]
                if source.name == "lookup":
                    step = offset + source.offsets[ranked[path][1] - 1][depth - 1]
                    score -= math.log1p(math.exp(-step))
                else:
                    step_logp = ranked[path[:depth]][1] - ranked[path[: depth - 1]][1]
                    score += accepted(source.slopes[depth - 1], source.offsets[0][depth - 1] + offset, step_logp)
            add(ranked[path][0], score, number_of(source.name))
    return found


def _retrieved(text, sources, model: SourceModel, noise):
    """Of each rank path its tokens, with their log-probability or how many tokens matched; None: not found."""
    if model.name == "matrix":
        paths = by_rank(sources["matrix"].matrix, text[-1], model.template, noise)
        return {(): ((), 0.0)} | dict(zip(model.template, paths, strict=True))
    tokens, matched = walked(text, len(model.template))
    return {path: (tuple(tokens[: len(path)]), matched) if matched else None for path in model.template}


def tree_by_rule(plan, case, noise):
    _, sources, drafted, _ = case
    builder = builder_of(plan, CPU)
    checkpoint = plan.checkpoints[-1]
    retrieved = builder.retrieve(checkpoint, sources, drafted.tokens_N[:1], noise)
    tree = builder.build(checkpoint, drafted, retrieved)
    assert int(tree.depths_N.max()) <= builder.depths[checkpoint.steps] == builder.max_depth
    assert all(tree.depths_N[row] == len(token_path(tree, row)) for row in filled_rows(tree))
    return builder, retrieved, tree


@given(rounds(), st.integers(1, 16), st.booleans())
def test_a_scored_plan_verifies_the_candidates_of_most_worth(case, nodes, told):
    """Worth is log P(accepted) on one scale; of several proposers of a path the best score and the first source."""
    *_, model = case
    noise = Noise(gumbel(3, 0, 14, VOCAB, CPU), 0.7) if told else None
    nodes = min(nodes, 1 + 100 + model.candidates)
    plan = ScoredPlan((Checkpoint(STEPS, num_draft_tokens=nodes),), topk=3, acceptance=model)
    builder, retrieved, tree = tree_by_rule(plan, case, noise)
    worth = scored_paths(*case, noise)
    kept = filled_rows(tree)
    best = sorted((score for score, _ in worth.values()), reverse=True)[: nodes - 1]
    assert tree.logp_N[kept].tolist() == pytest.approx(best, abs=5e-3)
    assert len({token_path(tree, row) for row in kept}) == len(kept)
    for row in kept:
        score, number = worth[token_path(tree, row)]
        assert (float(tree.logp_N[row]), int(tree.sources_N[row])) == (pytest.approx(score, abs=5e-3), number)
    if retrieved:
        threshold = max(float(one.logp_N.exp().sum()) for one in retrieved)
        for more, skips in ((-1e-3, True), (1e-3, False)):
            asked = Checkpoint(0, threshold + more)
            assert builder.skips_drafting(asked, retrieved).tolist() == [skips]


@given(rounds(), st.integers(1, 8))
def test_a_chain_plan_verifies_the_path_of_most_expected_tokens(case, nodes):
    *_, model = case
    plan = ChainPlan((Checkpoint(STEPS, num_draft_tokens=nodes),), acceptance=model)
    _, _, tree = tree_by_rule(plan, case, None)
    worth = {path: score for path, (score, _) in scored_paths(*case).items()}
    promised = {
        path: sum(math.exp(worth[path[:length]]) for length in range(1, len(path) + 1))
        for path in worth
        if len(path) < nodes
    }
    kept = filled_rows(tree)
    assert tree.parents_N[kept].tolist() == list(range(len(kept)))
    assert promised.get(tuple(tree.tokens_N[kept].tolist()), 0.0) == pytest.approx(
        max(promised.values(), default=0.0), abs=5e-3
    )


@given(rounds(), templates(root_alone=False), st.integers(0, 8), st.integers(0, 12), st.booleans())
def test_a_quota_plan_verifies_the_heads_best_and_the_first_new_ones_of_the_template(case, paths, drafts, quota, has):
    """What the head drafted takes no retrieved node's place; without a matrix the head's nodes stand alone."""
    text, sources, drafted, _ = case
    quota = min(quota, len(paths))
    plan = QuotaPlan((QuotaCheckpoint(STEPS, drafted=drafts, retrieved=quota, template=paths),), topk=3)
    _, _, tree = tree_by_rule(plan, (text, sources if has else {}, drafted, None), None)
    best = drafted.best(drafts)
    have = [token_path(best, row) for row in range(1, len(best))]
    ranked = by_rank(sources["matrix"].matrix, text[-1], paths) if has else []
    new = [one[0] for one in ranked if one and one[0] not in have][:quota]
    assert [token_path(tree, row) for row in filled_rows(tree)] == have + new
    assert len(tree) == 1 + len(have) + (quota if has else 0)
    assert tree.sources_N[filled_rows(tree)].tolist() == [1] * len(have) + [number_of("matrix")] * len(new)


@pytest.mark.parametrize("told", [False, True])
def test_both_sources_are_scored_on_one_scale(told):
    """By hand: root 2; the head knows 0, 1 and 3 with 0.2, 0.6 and 0.1, the matrix 0, 1, 3 and 4."""
    known, steps = {0: 0.4, 1: 0.3, 3: 0.15, 4: 0.1}, {0: math.log(0.2), 1: math.log(0.6), 3: math.log(0.1)}
    ids, probs = torch.full((5, 4), -1, dtype=torch.int32), torch.zeros(5, 4)
    ids[2], probs[2] = torch.tensor(list(known)), torch.tensor(list(known.values()))
    plan = replace(learned_plan(), checkpoints=(Checkpoint(1, num_draft_tokens=5),))
    model = replace(plan.acceptance.sources[0], template=((0,), (1,), (2,), (3,)))
    plan = replace(plan, acceptance=replace(plan.acceptance, sources=(model,)))
    noise = Noise(torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), 0.7) if told else None
    builder = builder_of(plan, CPU)
    sources = {"matrix": MatrixSource(SuccessorMatrix(ids, probs.half()))}
    retrieved = builder.retrieve(plan.checkpoints[0], sources, torch.tensor([2]), noise)
    drafted = tree_of([2, *steps], [0] * 4, [0.0, *steps.values()])
    tree = builder.build(plan.checkpoints[0], drafted, retrieved)
    found = {int(tree.tokens_N[row]): float(tree.logp_N[row]) for row in range(1, 5)}

    scores = {token: math.log(prob) for token, prob in known.items()}
    if noise:
        scores = {token: score / 0.7 + float(noise.gumbel_PV[0, token]) for token, score in scores.items()}
        total = sum(map(math.exp, scores.values())) + max(1 - sum(known.values()), LEAST) * math.exp(0.5772156649)
        scores = {token: score - math.log(total) for token, score in scores.items()}
    slope, offset = model.slopes[0], model.offsets[0][0]
    expected = {
        token: accepted(slope, offset + model.ranks[rank], scores[token])
        for rank, token in enumerate(sorted(scores, key=lambda token: -scores[token]))
    }
    for token, step in steps.items():
        expected[token] = max(expected[token], accepted(*plan.acceptance.drafted[0], step))
    assert found == pytest.approx(expected, abs=2e-3)

"""Acceptance models: what is refused, and scores against a walk along the path."""

import math
from dataclasses import replace

import pytest
import torch

from graft_inference import AcceptanceModel, GraftError, SourceModel
from graft_inference.policy.acceptance import LEAST, SourceScorer, by_evidence, calibrated
from graft_inference.proposer import Proposal
from graft_inference.retrieval.prompt_lookup import LONGEST
from graft_inference.retrieval.sources import SOURCES, name_of, number_of
from graft_inference.template import chain

from .tiny import learned_plan

MATRIX, LOOKUP = learned_plan().acceptance.sources
BRANCHING = ((0,), (1,), (0, 0), (1, 0), (0, 1), (0, 1, 0))


def test_sources_have_the_numbers_that_trees_keep():
    assert {name: number_of(name) for name in SOURCES} == {"matrix": 2, "lookup": 3}
    assert [name_of(number) for number in (1, 2, 3)] == ["drafted", "matrix", "lookup"]


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (MATRIX, {"name": "trie"}, "asks the source 'trie', but there are only matrix, lookup"),
        (MATRIX, {"name": 3}, "name=3 .* must be"),
        (MATRIX, {"slopes": ()}, "matrix must have 1 rows of offsets, and slopes only where"),
        (MATRIX, {"slopes": (0.7, 0.7, 0.0, 1.0)}, "slopes of matrix must be positive: calibrate again"),
        (MATRIX, {"slopes": (0.7, 0.7, -0.9, 1.0)}, "slopes of matrix must be positive: calibrate again"),
        (MATRIX, {"slopes": (0.7,)}, "matrix has 1 known depths, its template has 4"),
        (MATRIX, {"offsets": ((-0.3, -0.4, -0.5),)}, "matrix has 3 known depths, its template has 4"),
        (MATRIX, {"offsets": ()}, "matrix must have 1 rows of offsets"),
        (MATRIX, {"offsets": MATRIX.offsets * 2}, "matrix must have 1 rows of offsets"),
        (MATRIX, {"ranks": (0.2, 0.0, -0.1)}, "matrix has 3 known ranks, its template uses more"),
        (MATRIX, {"template": ((0, 0),)}, r"the template of matrix needs ranks from 0, and the parent of \[0, 0\]"),
        (MATRIX, {"ranks": (math.nan, 0.0, 0.0, 0.0)}, "ranks=.* must be"),
        (LOOKUP, {"slopes": (1.0,) * 5}, f"lookup must have {LONGEST} rows of offsets, and slopes only where"),
        (LOOKUP, {"offsets": LOOKUP.offsets[1:]}, f"lookup must have {LONGEST} rows of offsets"),
        (LOOKUP, {"offsets": (*LOOKUP.offsets[1:], (-0.1,))}, "lookup has 1 known depths, its template has 5"),
        (LOOKUP, {"offsets": (*LOOKUP.offsets[1:], (-0.1,) * 6)}, r"lookup has rows of \[.*5, 6\] depths"),
        (MATRIX, {"offsets": ((-0.1,) * 5,)}, r"matrix has rows of \[5, 4\] depths"),
        (LOOKUP, {"ranks": ()}, "lookup has 0 known ranks, its template uses more"),
        (LOOKUP, {"template": chain(6)}, "lookup has 5 known depths, its template has 6"),
    ],
)
def test_impossible_models_of_a_source_are_refused(model, values, message):
    with pytest.raises(GraftError, match=message):
        replace(model, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": (MATRIX, LOOKUP, MATRIX)}, "asks each source once, not .*matrix.*lookup.*matrix"),
        ({"drafted": ((0.0, 1.0),)}, "slopes of drafted nodes must be positive: calibrate again"),
        ({"drafted": ((1.0, 0.0), (-1.0, 0.0))}, "slopes of drafted nodes must be positive: calibrate again"),
        ({"drafted": ((1.0,),)}, "drafted=.* must be"),
        ({"drafted": ((math.inf, 0.0),)}, "drafted=.* must be"),
    ],
)
def test_impossible_acceptance_models_are_refused(values, message):
    with pytest.raises(GraftError, match=message):
        AcceptanceModel(**values)


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


@pytest.mark.parametrize("template", [chain(5), BRANCHING], ids=["chain", "branching"])
def test_by_evidence_is_the_product_along_the_path(template):
    generator = torch.Generator().manual_seed(0)
    offsets = tuple(map(tuple, (2 * torch.randn((LONGEST, 5), generator=generator)).tolist()))
    model = SourceModel("lookup", template, (), offsets, (0.25, -0.75))
    table_KT = by_evidence(model)
    assert table_KT.shape == (LONGEST + 1, 1 + len(template))
    assert table_KT[:, 0].tolist() == [0.0] * (LONGEST + 1)
    assert table_KT[0, 1:].tolist() == [-math.inf] * len(template)
    for kind in range(1, LONGEST + 1):
        for row, path in enumerate(template, 1):
            steps = [offsets[kind - 1][depth] + model.ranks[rank] for depth, rank in enumerate(path)]
            assert float(table_KT[kind, row]) == pytest.approx(sum(map(log_sigmoid, steps)), abs=1e-5)


def test_a_step_whose_probability_is_no_number_is_never_accepted():
    table_N2 = torch.tensor([(1.0, 0.5)] * 4)
    scores = calibrated(table_N2, torch.tensor([math.nan, math.log(0.5), 0.0, -math.inf])).tolist()
    sure = math.log((1 - LEAST) / LEAST)
    assert scores[0] == -math.inf
    assert scores[1:] == pytest.approx([log_sigmoid(value) for value in (0.5, sure + 0.5, 0.5 - sure)], rel=2e-3)


@pytest.mark.parametrize("kind", [0, 1, LONGEST])
def test_a_source_that_goes_by_evidence_is_scored_by_its_kind(kind):
    scorer = SourceScorer(LOOKUP, torch.device("cpu"))
    tree = scorer.template.tree(torch.arange(6), None)
    scored = scorer.score(Proposal(tree, torch.tensor([kind])))
    assert scored.logp_N.tolist() == by_evidence(LOOKUP)[kind].tolist()


def test_nodes_of_probabilities_are_worth_the_product_along_the_path():
    model = replace(MATRIX, template=BRANCHING)
    scorer = SourceScorer(model, torch.device("cpu"))
    probs = {(): 1.0} | {path: 0.9 - 0.1 * row for row, path in enumerate(BRANCHING)}
    tokens_T = torch.tensor([7, 1, 2, 3, -1, 5, 6])
    steps_T = torch.tensor([0.0, *(math.log(probs[path]) for path in BRANCHING)])
    scored = scorer.score(Proposal(scorer.template.tree(tokens_T, steps_T.masked_fill(tokens_T < 0, -torch.inf))))
    for row, path in enumerate(BRANCHING, 1):
        expected = 0.0
        for depth in range(1, len(path) + 1):
            odds = math.log(probs[path[:depth]] / (1 - probs[path[:depth]]))
            offset = model.offsets[0][depth - 1] + model.ranks[path[depth - 1]]
            expected += log_sigmoid(model.slopes[depth - 1] * odds + offset)
        expected = -math.inf if path == (1, 0) else expected
        assert float(scored.logp_N[row]) == pytest.approx(expected, abs=1e-4), path
    assert float(scored.logp_N[0]) == 0


@pytest.mark.parametrize("model", [MATRIX, LOOKUP], ids=["probabilities", "evidence"])
def test_scores_lie_on_the_device_that_is_asked_for(model):
    """Shown on the device without memory, which refuses what lies on the CPU, as a GPU does."""
    meta = torch.device("meta")
    scorer = SourceScorer(model, meta)
    tokens_T = torch.zeros(1 + len(model.template), dtype=torch.long, device=meta)
    tree = scorer.template.tree(tokens_T, None if model is LOOKUP else tokens_T.float())
    assert scorer.score(Proposal(tree, torch.zeros(1, dtype=torch.long, device=meta))).logp_N.is_meta

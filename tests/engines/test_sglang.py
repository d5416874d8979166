"""Graft's trees among SGLang's own classes and tree kernels, without a GPU: no model and no server runs here."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import graft_inference
from graft_inference.bundle import load_successors
from graft_inference.integrations.trees import Shape, TreeRounds, drafted_trees
from graft_train.data.samples import answered, append_samples
from graft_train.texts import write_texts
from tests.graft_inference.test_chain_rounds import write_plan
from tests.graft_inference.test_tree_rounds import eagle_lists, paths_of, tree_paths, walk
from tests.graft_inference.tiny import VOCAB, learned_plan
from tests.graft_inference.tiny_bundle import write_bundle, write_target

from .environments import HERE, run_driver

pytestmark = pytest.mark.engines("sglang")

TOPK, STEPS, NODES, BATCH = 3, 4, 12, 3
TEXTS = [[3, 5, 7, 9], [1, 2, 3], [8, 4, 2, 6, 35]]
"""Of letters and digits, none of which make a pair."""
MODES = ("FULL_MASK", "QLEN_ONLY")


@dataclass
class Made:
    """What the driver found, and what it should have: the paths of each request's tree, and what the target says."""

    found: dict
    lengths: list[int]
    ours: list[set]
    theirs: list[set]


def longest(paths: set) -> tuple[int, ...]:
    return max(paths, key=lambda path: (len(path), path))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("sglang")
    target = write_target(root / "target")
    bundle = write_bundle(root / "bundle", target)
    write_plan(bundle, learned_plan())
    generator = torch.Generator().manual_seed(5)
    lists = eagle_lists(BATCH, TOPK, STEPS, VOCAB, generator)
    texts = [torch.randint(VOCAB, (length,), generator=generator).repeat(2) for length in (5, 9, 14)]
    lengths = torch.tensor([len(text) - 1 for text in texts])
    said = {f"p_{step}": p for step, (p, _) in enumerate(lists.said)}
    said |= {f"ids_{step}": ids for step, (_, ids) in enumerate(lists.said)}
    save_file(said | {"lengths": lengths}, root / "candidates.safetensors")
    roots = torch.stack([text[-1] for text in texts])
    drafted = drafted_trees(roots, lists.tokens_BC, lists.probabilities_BC, lists.expanded_BG, TOPK)
    matrix = load_successors(bundle / "successors.safetensors", VOCAB)
    trees = TreeRounds(learned_plan(), {"matrix": matrix}, Shape(TOPK, STEPS, NODES)).trees(texts, drafted)
    ours = [paths_of(trees, row) for row in range(BATCH)]
    says = []
    for paths in ours:  # the target goes the longest way of Graft's tree, and then says what no tree has
        way = longest(paths)
        says.append({" ".join(map(str, way[:depth])): token for depth, token in enumerate(way)})
    job = {"bundle": str(bundle), "target": str(target), "candidates": str(root / "candidates.safetensors")}
    job |= {"texts": [text.tolist() for text in texts], "nodes": NODES, "predict": says}
    (root / "run" / "data").mkdir(parents=True)
    with (root / "run" / "data" / "samples.jsonl").open("wb") as file:
        append_samples(file, [answered(f"s{number}", text[:2], text[2:], {}) for number, text in enumerate(TEXTS)])
    write_texts(root / "run", str(target), root / "corpus.jsonl")
    job["corpus"] = str(root / "corpus.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(graft_inference.__file__).parents[1]))
        found = run_driver("sglang", HERE / "sglang_driver.py", root, job)
    return Made(found, lengths.tolist(), ours, [tree_paths(tree.best(NODES - 1)) for tree in drafted])


def test_sglang_takes_the_algorithm_and_gets_the_answers_of_eagle3(made):
    """But where a round of Graft could not do it: mixed chunks, and grammars beside overlap."""
    ours, theirs = made.found["algorithm"], made.found["eagle3"]
    differing = {name for name in theirs if ours[name] != theirs[name]}
    assert differing == {"supports_mixed_chunk", "supports_grammar_overlap"}
    assert not ours["supports_mixed_chunk"]
    assert ours["is_eagle3"] is True


def test_no_method_is_lacking_that_sglang_calls_on_an_algorithm(made):
    """SGLang's own base class for plug-ins lacks some, and nothing there says so when one is registered."""
    lacking = made.found["asked"]
    assert lacking["graft"] == lacking["SGLang's own"] == []
    assert lacking["stock"] == ["carries_draft_hidden_states", "create_future_map", "need_topk"]


def test_what_a_round_leaves_to_the_next_is_kept_as_for_eagle3(made):
    """Without those methods SGLang's scheduler fails where it makes room for that, after the model is loaded."""
    relayed = made.found["relayed"]
    token, p, ids, states = relayed["GRAFT"]
    assert (token, ids, states) == ([5], [[7, 1]], [[1.0] * 4])
    assert p == [pytest.approx([0.5, 0.3])]
    assert relayed["EAGLE3"] == relayed["GRAFT"]
    assert relayed["STOCK"] == "'CustomSpecAlgo' object has no attribute 'create_future_map'"


def test_sglang_settles_what_it_does_for_eagle3(made):
    assert made.found["defaults"] == [48, False]


def test_the_hooks_reach_sglangs_worker(made):
    assert made.found["hooks"] == {"worker": True, "draft worker": True, "organize": True}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("whose", ["stock", "graft"])
def test_the_trees_are_what_sglangs_own_kernels_build_and_verify(made, mode, whose):
    """SGLang's tree of the best drafted nodes first, which shows that candidates are read as SGLang means them."""
    shown, expected = made.found[mode][whose], made.theirs if whose == "stock" else made.ours
    assert shown["sees text"]
    for row, paths in enumerate(expected):
        tokens = shown["tokens"][row]
        reached = walk(tokens, shown["child"][row], shown["sibling"][row])
        assert set(reached.values()) == paths
        for node, path in reached.items():
            assert shown["positions"][row][node] == made.lengths[row] + len(path)
            seen = [one for one, sees in enumerate(shown["sees"][row][node]) if sees]
            assert [tokens[one] for one in seen[1:]] == list(path)
            assert (seen[0], seen[-1]) == (0, node)
        way = longest(made.ours[row])
        known = max(depth for depth in range(len(way) + 1) if way[:depth] in paths)
        assert shown["accepted"][row] == list(way[:known])
    assert made.found[mode]["sizes"] == [NODES, -1, True]


def test_what_graft_cannot_do_is_refused_before_a_model_is_loaded(made):
    refused = made.found["refused"]
    assert refused.pop("what the help says") is None
    assert refused.pop("pages of triton") is None
    assert "this is SGLang 0.5.22, and Graft was written for 0.5.23: install that" in refused.pop("another version")
    assert "the EAGLE worker of this SGLang is not that of 0.5.23" in refused.pop("another worker")
    wanted = {
        "speculative_num_steps": "--speculative-num-steps is missing",
        "speculative_eagle_topk": "--speculative-eagle-topk 1 makes chains",
        "disable_overlap_schedule": "set --disable-overlap-schedule",
        "pp_size": "without pipeline parallelism",
        "attn_dp_size": "without pipeline parallelism and attention by data parallelism",
        "disaggregation_mode": "leave out --disaggregation-mode",
        "attention_backend": "over pages of 64 tokens with fa3, flashinfer, triton alone: set --page-size 1",
        "speculative_use_rejection_sampling": "--speculative-use-rejection-sampling is for SGLang's own trees",
        "speculative_adaptive": "--speculative-adaptive is for SGLang's own trees",
    }
    assert refused.keys() == wanted.keys()
    for name, message in wanted.items():
        assert message in refused[name]


def test_sglang_reads_the_texts_that_we_write_for_its_own_retrieval(made):
    """By its own reader, and the request that its endpoint takes is one of its own class."""
    corpus = made.found["corpus"]
    separator = -(2**31)
    first, *rest = TEXTS
    assert corpus["chunks"] == [first, *([separator, *text] for text in rest)]
    assert corpus["request"] == {"corpus_id": "run", "file_path": corpus["request"]["file_path"]}
    assert "exceeds the configured token limit (9)" in corpus["too few"]


def test_graft_accepts_more_than_the_heads_own_tree_where_the_text_repeats(made):
    shown = made.found["FULL_MASK"]
    assert sum(map(len, shown["graft"]["accepted"])) > sum(map(len, shown["stock"]["accepted"]))

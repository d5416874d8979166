"""Graft inside vLLM: the target's text, in just the rounds that our engine needs for the same chains."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import graft_inference
from graft_inference import AcceptanceModel, ChainPlan, Checkpoint, GraftEngine, SourceModel
from graft_inference.retrieval.sources import SOURCES
from graft_inference.template import chain
from graft_inference.tree import Source

from .environments import run_vllm
from .pair import NEW_TOKENS, PROMPTS, SERVED, greedy, write_bundle, write_target

pytestmark = pytest.mark.engines("vllm")

KINDS = SOURCES["lookup"].kinds
LOOKUP = SourceModel("lookup", chain(5), (), tuple((kind / KINDS - 1.5,) * 5 for kind in range(KINDS)), (0.0,))
MATRIX = SourceModel("matrix", chain(2), (1.0,) * 2, ((-2.0,) * 2,), (0.0,))
BOTH = AcceptanceModel(((1.0, 0.0),) * 4, (MATRIX, LOOKUP))
PLANS = {
    "head and sources": ChainPlan(
        (Checkpoint(0, 2.2, 6), Checkpoint(1, 0.6, 4), Checkpoint(4, 0.0, 6)), acceptance=BOTH
    ),
    "head alone, stopped early": ChainPlan(
        (Checkpoint(1, 0.8, 2), Checkpoint(2, 0.7, 3), Checkpoint(4, 0.0, 5)),
        acceptance=AcceptanceModel(BOTH.drafted),
    ),
}


RUNTIME = Path(graft_inference.__file__).parents[1]


@pytest.fixture(autouse=True)
def _vllm_finds_the_runtime(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(RUNTIME))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Directories of a target and of a bundle, and the target itself."""
    directory = tmp_path_factory.mktemp("pair")
    model = write_target(directory / "target")
    head = {"draft_vocab_size": 64, "aux_layer_ids": [1, 2, 4], "ttt_steps": 4}
    return directory / "target", write_bundle(directory / "run", directory / "target", model, **head), model


def with_plan(bundle: Path, directory: Path, plan: ChainPlan) -> Path:
    """A copy of the bundle whose policy is this plan."""
    copy = shutil.copytree(bundle, directory / "bundle")
    graft = json.loads((copy / "graft.json").read_text())
    graft["policy"]["graft"] = plan.to_dict()
    (copy / "graft.json").write_text(json.dumps(graft))
    return copy


def speculative(bundle: Path, length: int, **changes: Any) -> dict[str, Any]:
    values = {"method": "eagle3", "model": str(bundle), "num_speculative_tokens": length}
    return values | {"disable_padded_drafter_batch": True} | changes


def served(
    directory: Path, target: Path, prompts: Iterable[torch.Tensor], speculative_config: dict[str, Any], **job: Any
) -> dict[str, Any]:
    """What Graft makes in vLLM."""
    job = {
        "worker_cls": "graft_inference.integrations.vllm.GraftWorker",
        "target": str(target),
        "prompts": [prompt.tolist() for prompt in prompts],
        "max_tokens": NEW_TOKENS,
        "speculative_config": speculative_config,
    } | job
    return run_vllm(directory, **job | {"settings": {"max_model_len": 128} | job.get("settings", {})})


def expected(target: Path, bundle: Path, plan: ChainPlan, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What our engine drafts for `SERVED` by the same plan, counted as vLLM counts."""
    engine = GraftEngine.from_pretrained(bundle, target, "cpu", "float32", fallback=False, retrieval_scope="frozen")
    engine.eos_token_ids = frozenset()
    chains, build = [], engine.speculator.build

    def watched(requests: Any, drafts: Any) -> Any:
        chosen = build(requests, drafts)
        chains.append(int((chosen[0][1].sources_N > Source.ROOT).sum()))
        return chosen

    monkeypatch.setattr(engine.speculator, "build", watched)
    counted = {"drafts": 0, "draft_tokens": 0, "accepted": 0}
    for prompt in SERVED:
        chains.clear()
        # A last round may accept more than is asked for, which vLLM counts.
        out = engine.generate(prompt, NEW_TOKENS + plan.length, plan=plan)
        emitted = 1
        for drafted, accepted in zip(chains, accepted_by_round(out.stats.sources), strict=False):
            if emitted >= NEW_TOKENS:
                break
            emitted += accepted + 1
            counted["drafts"] += drafted > 0
            counted["draft_tokens"] += drafted
            counted["accepted"] += accepted
    return counted


def accepted_by_round(sources: list[str]) -> Iterator[int]:
    """Accepted tokens of every round: each ends with the target's own token."""
    accepted = 0
    for source in sources[1:]:
        if source != "bonus":
            accepted += 1
            continue
        yield accepted
        accepted = 0


@pytest.mark.parametrize("name", PLANS)
def test_graft_in_vllm_makes_the_rounds_of_our_engine(tmp_path, pair, monkeypatch, name):
    target, bundle, model = pair
    plan = PLANS[name]
    bundle = with_plan(bundle, tmp_path, plan)
    found = served(tmp_path, target, SERVED, speculative(bundle, plan.length))
    assert found["tokens"] == greedy(model, SERVED)
    ours = expected(target, bundle, plan, monkeypatch)
    assert {count: found[count] for count in ours} == ours
    assert ours["draft_tokens"] < plan.length * ours["drafts"], "chains of several lengths"
    assert ours["accepted"] > 0.3 * ours["drafts"]


def test_the_retriever_makes_the_rounds_of_the_sources_alone(tmp_path, pair, monkeypatch):
    target, bundle, model = pair
    plan = PLANS["head and sources"].without_drafting()
    bundle = with_plan(bundle, tmp_path, PLANS["head and sources"])
    config = {
        "method": "custom_class",
        "model": "graft_inference.integrations.vllm.GraftRetriever",
        "num_speculative_tokens": plan.length,
    }
    settings = {"additional_config": {"graft_bundle": str(bundle)}}
    found = served(tmp_path, target, SERVED, config, worker_cls=None, settings=settings)
    assert found["tokens"] == greedy(model, SERVED)
    ours = expected(target, bundle, plan, monkeypatch)
    assert {count: found[count] for count in ours} == ours
    assert ours["accepted"] > 0


def test_requests_that_come_and_go_keep_their_text(tmp_path, pair):
    """96 prompts of many lengths, 32 at a time, read in pieces of at most 48 tokens; prefixes are shared."""
    target, bundle, model = pair
    plan = PLANS["head and sources"]
    prompts = [torch.cat((PROMPTS[0, : n % 5], *PROMPTS[n : n + 1 + n % 4])) for n in range(96)]
    settings = {"max_num_seqs": 32, "max_num_batched_tokens": 48, "enable_prefix_caching": True}
    config = speculative(with_plan(bundle, tmp_path, plan), plan.length)
    found = served(tmp_path, target, prompts, config, settings=settings)
    assert found["tokens"] == [greedy(model, prompt[None])[0] for prompt in prompts]
    assert found["accepted"] > 0.3 * found["drafts"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_speculative_tokens": 6}, "chains of at most 5 tokens"),
        ({"disable_padded_drafter_batch": False}, "set disable_padded_drafter_batch to true"),
        ({"method": "ngram", "model": None, "prompt_lookup_max": 3}, "method must be eagle3, not ngram"),
    ],
)
def test_vllm_does_not_start_where_graft_cannot_run(tmp_path, pair, changes, told):
    target, bundle, _ = pair
    bundle = with_plan(bundle, tmp_path, PLANS["head and sources"])
    with pytest.raises(AssertionError, match=told):
        served(tmp_path, target, SERVED, speculative(bundle, 5) | changes)

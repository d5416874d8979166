"""No piece of a captured round moves data between host and device, whatever the family and the plan.

Seen without CUDA on the meta device, by the check that comes before every capture (`NoHostReads`).
"""

from unittest import mock

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from graft_inference import METHODS
from graft_inference.decode.cuda_graph import CannotCapture, NoHostReads
from graft_inference.decode.fixed import Buffers, FixedRound
from graft_inference.decode.sampling import Sampler
from graft_inference.heads.families import proposer_of
from graft_inference.policy.plan import ScoredPlan
from graft_inference.policy.tree_builder import builder_of
from graft_inference.retrieval.prompt_lookup import PromptLookup
from graft_inference.retrieval.successor_matrix import MatrixSource, SuccessorMatrix
from graft_inference.speculator import Speculator
from graft_inference.target.model import Target

from .families import FAMILIES, family_model
from .plain_head import VARIANTS
from .recorded import RecordedGraphs
from .test_block_drafter import LAYOUTS, SMALL, tiny_block_head
from .tiny import VOCAB, learned_policy, tiny_head, tiny_model, tiny_policy, told_policy

SIZE = 64
META = torch.device("meta")


def tensor(values, device=None, **options):
    assert device is None or torch.device(device).type == "cpu", "torch.tensor copies to the device"
    return TENSOR(values, device=device, **options)


TENSOR = torch.tensor


def checked(function, *args):
    """What the function returns the second time: the first may fill tables that are kept."""
    function(*args)
    with NoHostReads(), mock.patch.object(torch, "tensor", tensor):
        return function(*args)


class MetaGraphs(RecordedGraphs):
    def host(self, size):
        return torch.zeros(size, dtype=torch.long, device=META)


def fixed_round(model, plan, processors=(), greedy=True, logprobs=False, head=None, **changes) -> FixedRound:
    head = (head or tiny_head(model, **changes)).to(META, model.dtype)
    target = Target(model.to(META), head.config.aux_layer_ids)
    cache = target.new_cache(40)
    target.prefill(torch.zeros(9, dtype=torch.long, device=META), cache)
    buffers = Buffers(cache, SIZE, rows=12, depth=5, graphs=MetaGraphs())
    proposer = proposer_of(head, target.embed, target.unembed, target.max_positions)
    buffers.head = proposer.open(3, 0, SIZE).fix(buffers.fresh)
    buffers.noise_PV = None if greedy else torch.zeros((buffers.depth + 1, VOCAB), device=META)
    ids_VK = torch.zeros((VOCAB, 4), dtype=torch.int32, device=META)
    matrix = SuccessorMatrix(ids_VK, torch.zeros((VOCAB, 4), dtype=torch.float16, device=META))
    sources = {"matrix": MatrixSource(matrix), "lookup": PromptLookup(2 * SIZE, META)}
    return FixedRound(
        buffers=buffers,
        target=target,
        speculator=Speculator(proposer),
        builder=builder_of(plan, META),
        sampler=Sampler(LogitsProcessorList(processors), greedy, buffers.seed_1),
        size=SIZE,
        sources={name: sources[name] for name in plan.sources},
        drafts=True,
        logprobs=logprobs,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", [tiny_policy, learned_policy, told_policy])
@torch.inference_mode()
def test_every_piece_of_every_plan(policy, method):
    pieces = fixed_round(tiny_model("llama"), policy().plan(method), greedy=policy is not told_policy)
    draft, retrieved = None, None
    for checkpoint in pieces.plan.checkpoints:
        if checkpoint.steps == 0 and len(pieces.plan.checkpoints) > 1:
            retrieved = checked(pieces.look_up, checkpoint)
            checked(pieces.build, checkpoint, None, retrieved)
            continue
        if checkpoint.steps:
            given = retrieved if isinstance(pieces.plan, ScoredPlan) else None
            draft, retrieved = checked(pieces.draft, checkpoint, draft, given)
            assert draft.steps == checkpoint.steps
        if checkpoint.num_draft_tokens > 1:
            checked(pieces.build, checkpoint, draft, retrieved)
        checked(pieces.verify, checkpoint.num_draft_tokens, pieces.builder.depths[checkpoint.steps])
    checked(pieces.catch_up)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.inference_mode()
def test_every_kind_of_head_drafts(changes):
    pieces = fixed_round(tiny_model("llama"), tiny_policy().graft, **changes)
    draft = None
    for checkpoint in pieces.plan.checkpoints:
        draft, _ = checked(pieces.draft, checkpoint, draft, None)
    assert draft.steps == 4
    checked(pieces.catch_up)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_every_kind_of_block_head_drafts(layout):
    model = tiny_model("llama", vocab_size=SMALL)
    pieces = fixed_round(model, tiny_policy().graft, head=tiny_block_head(model, **LAYOUTS[layout]))
    draft = None
    for checkpoint in pieces.plan.checkpoints:
        draft, _ = checked(pieces.draft, checkpoint, draft, None)
    assert draft.steps == 4
    checked(pieces.catch_up)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_every_family_verifies(family):
    pieces = fixed_round(family_model(family).bfloat16(), tiny_policy().graft)  # experts' fast path knows no other
    checked(pieces.verify, 12, 4)
    checked(pieces.verify, 1, 0)


@pytest.mark.parametrize("policy", [tiny_policy, learned_policy, told_policy])
@torch.inference_mode()
def test_every_way_to_sample_and_to_learn(policy):
    ways = (TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1))
    pieces = fixed_round(tiny_model("llama"), policy().graft, ways, greedy=False, logprobs=True)
    checked(pieces.draft, pieces.plan.checkpoints[-1], None, None)
    checked(pieces.verify, 12, 4)


def test_the_check_finds_what_it_looks_for():
    device = torch.zeros(3, device=META)
    host = torch.zeros(3, dtype=torch.long)
    for copy in (lambda: device[host], lambda: host.to(META), lambda: device.copy_(host), lambda: bool(device[0] > 0)):
        with pytest.raises(CannotCapture), NoHostReads():
            copy()
    with pytest.raises(AssertionError, match=r"torch.tensor copies"):
        checked(lambda: torch.tensor([1, 2], device=META))
    checked(lambda: device * torch.tensor(2.0))

"""Tiny random pairs. The head is random too: it drafts badly, and output must be the target's all the same."""

from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from graft_inference import (
    AcceptanceModel,
    Checkpoint,
    GenerationStats,
    GraftEngine,
    Policy,
    QuotaCheckpoint,
    QuotaPlan,
    ScoredPlan,
    SourceModel,
)
from graft_inference.heads.eagle3.model import DraftHead, DraftHeadConfig
from graft_inference.request import Row
from graft_inference.retrieval.prompt_lookup import LONGEST
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.target.model import Target
from graft_inference.template import chain

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny_model(family: str, seed: int = 0, **overrides):
    torch.manual_seed(seed)
    sizes = SIZES | overrides
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16, max_window_layers=4))
    # Random weights of the usual size give nearly flat logits, where every argmax is a near tie.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    return model.eval().requires_grad_(False)


def tiny_head(model, draft_vocab_size: int = 40, seed: int = 1, **overrides) -> DraftHead:
    torch.manual_seed(seed)
    config = model.config
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": draft_vocab_size,
        "aux_layer_ids": (0, 1, 3),
        "max_position_embeddings": 256,
    }
    head = DraftHead(DraftHeadConfig(**(sizes | overrides)))
    head.set_draft_vocabulary(torch.randperm(config.vocab_size)[:draft_vocab_size].sort().values)
    for parameter in head.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return head.eval().requires_grad_(False)


TEMPLATE = ((0,), (1,), (0, 0), (2,), (0, 1), (0, 0, 0), (1, 0), (3,), (0, 0, 0, 0), (1, 1))


def tiny_policy(threshold: float = 0.3) -> Policy:
    """Stops at every checkpoint now and then; drafted and retrieved nodes overlap."""
    graft = QuotaPlan(
        (
            QuotaCheckpoint(1, threshold, drafted=3, retrieved=6, template=TEMPLATE),
            QuotaCheckpoint(2, threshold, drafted=5, retrieved=4, template=TEMPLATE),
            QuotaCheckpoint(4, drafted=8, retrieved=2, template=TEMPLATE[:4]),
        ),
        topk=3,
    )
    return Policy(
        graft=graft,
        eagle3=QuotaPlan((QuotaCheckpoint(3, drafted=9),), topk=3),
        retrieve=QuotaPlan((QuotaCheckpoint(0, retrieved=8, template=TEMPLATE),)),
    )


def learned_plan(threshold: float = 0.3, gate: float = 2.25) -> ScoredPlan:
    """Both sources compete, in every way a plan can let them: drafting left out, early stops."""
    acceptance = AcceptanceModel(
        drafted=((0.8, -0.1), (0.9, -0.2), (1.0, -0.2), (1.2, -0.3)),
        sources=(
            SourceModel("matrix", TEMPLATE, (0.7, 0.7, 0.9, 1.0), ((-0.3, -0.4, -0.5, -0.6),), (0.2, 0.0, -0.1, 0.1)),
            SourceModel("lookup", chain(5), (), tuple((matched / 6 - 1,) * 5 for matched in range(LONGEST)), (0.0,)),
        ),
    )
    checkpoints = (
        Checkpoint(0, gate, num_draft_tokens=8),
        Checkpoint(1, threshold, num_draft_tokens=6),
        Checkpoint(2, threshold, num_draft_tokens=10),
        Checkpoint(4, num_draft_tokens=12),
    )
    return ScoredPlan(checkpoints, topk=3, acceptance=acceptance, learns_accepted=True)


def without_lookup(plan: ScoredPlan) -> ScoredPlan:
    """The same plan, which does not look into the request's own text."""
    sources = tuple(source for source in plan.acceptance.sources if source.name != "lookup")
    return replace(plan, acceptance=replace(plan.acceptance, sources=sources))


def told_policy(threshold: float = 0.3, gate: float = 2.25) -> Policy:
    """Plans that share the noise of draws: the learned one as graft, the tiny policy's other two."""
    policy = tiny_policy(threshold)
    return Policy(
        graft=replace(learned_plan(threshold, gate), shares_noise=True),
        eagle3=replace(policy.eagle3, shares_noise=True),
        retrieve=replace(policy.retrieve, shares_noise=True),
    )


def learned_policy(threshold: float = 0.3, gate: float = 2.25) -> Policy:
    return replace(tiny_policy(), graft=learned_plan(threshold, gate))


def prefilled(engine, prompt_S, new_tokens, sampler, plan, stats=None):
    """A state whose prompt has been read, and its first token."""
    row = Row(prompt_S, prompt_S, new_tokens, sampler, is_last=None)
    (state,), (first,) = engine._prefill([row], plan, [stats or GenerationStats()], [None])
    return state, first


def tiny_engine(
    model, policy: Policy | None = None, head: DraftHead | None = None, fallback: bool = False
) -> GraftEngine:
    """Without falling back unless asked: that goes by the time that rounds take, which is no test's business."""
    head = head or tiny_head(model)
    vocab_size = model.config.vocab_size
    generator = torch.Generator().manual_seed(3)
    ids_VK = torch.rand(vocab_size, vocab_size, generator=generator).argsort(dim=1)[:, :4].to(torch.int32)
    probs_VK = torch.rand(vocab_size, 4, generator=generator).softmax(dim=1).sort(dim=1, descending=True).values.half()
    matrix = SuccessorMatrix(ids_VK, probs_VK)
    target = Target(model, head.config.aux_layer_ids)
    return GraftEngine(target, policy or tiny_policy(), head, matrix, fallback=fallback)

"""The drafted tree against a plain beam search that re-reads every path without a cache."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import LogitsProcessorList, TopKLogitsWarper

from graft_inference.heads.eagle3.drafter import Eagle3Proposer
from graft_inference.noise import LEFT_OUT, Noise, gumbel
from graft_inference.target.model import Target

from .plain_head import VARIANTS, PlainHead, varied
from .tiny import tiny_head, tiny_model
from .trees import token_path

LENGTH, BEAM, PASSES = 7, 3, 4
NOISE = Noise(gumbel(3, 5, PASSES, 61, torch.device("cpu")), 0.4)


def plain_logp(head, target, tokens, feature, noise=None):
    """Log-probabilities over target ids after a path: tokens[i] beside feature i; later features are the
    head's own outputs. One whole pass per step, plain causal attention, no cache."""
    steps = len(tokens) - len(feature)
    features = feature
    embedding = target.embed(torch.tensor(tokens)[None])
    for _ in range(steps + 1):
        size = features.shape[0]
        attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
        out = head(embedding[:, :size], features[None], torch.arange(size)[None], attend)[0]
        features = torch.cat((features, out[-1:]))
    scores = head.logits(out[-1])
    if noise:
        left_out = scores < scores.topk(noise.warpers[0].top_k).values[-1] if noise.warpers else torch.zeros(1)
        scores = scores / noise.temperature + noise.gumbel_PV[steps][head.target_ids] - LEFT_OUT * left_out
    logp = scores.log_softmax(-1)
    return {int(head.target_ids[i]): float(logp[i]) for i in range(len(logp))}


def plain_tree(head, target, tokens, feature, noise=None):
    """{token path: score} of EAGLE's beam search, and the best score of the deepest layer."""
    scores, beam = {}, [((), 0.0)]
    for _ in range(PASSES):
        layer = {}
        for path, score in beam:
            logp = plain_logp(head, target, [*tokens, *path], feature, noise)
            for token in sorted(logp, key=logp.get, reverse=True)[:BEAM]:
                layer[(*path, token)] = score + logp[token]
        scores |= layer
        beam = sorted(layer.items(), key=lambda item: -item[1])[:BEAM]
    return scores, beam[0][1]


@pytest.mark.parametrize("noise", [None, NOISE, replace(NOISE, warpers=LogitsProcessorList([TopKLogitsWarper(2)]))])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("chunks", [[LENGTH], [3, 4], [1, 1, 5], [6, 1]])
def test_draft_equals_plain_beam_search(family, chunks, noise):
    model = tiny_model(family)
    head = tiny_head(model)
    target = Target(model, head.config.aux_layer_ids)
    torch.manual_seed(5)
    tokens = torch.randint(0, 61, (LENGTH,))
    taps = torch.randn(LENGTH, 3 * model.config.hidden_size)
    with torch.inference_mode():
        proposer = Eagle3Proposer(head, target.embed, target.max_positions)
        drafter = proposer.open(BEAM, PASSES, LENGTH)
        start = 0
        for chunk in chunks:  # as rounds do: drafting in between must leave nothing behind
            fresh = (tokens[start : start + chunk], taps[start : start + chunk])
            (draft,) = proposer.begin([drafter], [fresh], [fresh[0][-1:]], [noise])
            for _ in range(PASSES - 1):
                (draft,) = proposer.deepen([drafter], [draft])
            start += chunk
        expected, deepest = plain_tree(head, target, tokens.tolist(), head.fuse(taps), noise)
    tree = draft.candidates
    found = {token_path(tree, row): float(tree.logp_N[row]) for row in range(1, len(tree))}
    assert found.keys() == expected.keys()
    for path, score in expected.items():
        assert found[path] == pytest.approx(score, abs=2e-3)
    assert float(draft.confidence.log()) == pytest.approx(deepest, abs=2e-3)


def tree_of_variant(head, target, tokens, taps):
    """{token path: score} of EAGLE's beam search with the plain head."""
    plain, scores, beam = PlainHead(head), {}, [((), 0.0)]
    for _ in range(PASSES):
        layer = {}
        for path, score in beam:
            embeddings = target.embed(torch.tensor([*tokens, *path]))
            logp = plain.chain(taps, embeddings)[1][-1].log_softmax(-1)
            best = logp.topk(BEAM)
            for place, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                layer[(*path, int(head.target_ids[place]))] = score + value
        scores |= layer
        beam = sorted(layer.items(), key=lambda item: -item[1])[:BEAM]
    return scores


@pytest.mark.parametrize("fixed", [False, True], ids=["grown", "fixed buffers"])
@pytest.mark.parametrize("chunks", [[LENGTH], [3, 4], [1, 1, 5], [6, 1]], ids=str)
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.inference_mode()
def test_a_tree_of_every_variant_is_the_plain_heads(changes, chunks, fixed):
    """Grown caches draft for two prompts at once; a fixed span reads its last chunk from where it is pending."""
    model = tiny_model("llama")
    head = varied(tiny_head(model, **changes))
    target = Target(model, head.config.aux_layer_ids)
    torch.manual_seed(5)
    tokens, taps = torch.randint(0, 61, (LENGTH,)), torch.randn(LENGTH, 3 * model.config.hidden_size)
    proposer = Eagle3Proposer(head, target.embed, target.max_positions)
    drafters, start = [proposer.open(BEAM, PASSES, LENGTH) for _ in range(2)], 0
    for chunk in chunks[:-1] if fixed else chunks:
        fresh = (tokens[start : start + chunk], taps[start : start + chunk])
        drafts = begin_and_deepen(proposer, drafters, fresh)
        start += chunk
    if fixed:
        drafters = [on_fixed_buffers(proposer, drafter, tokens[start:], taps[start:]) for drafter in drafters[:1]]
        drafts = begin_and_deepen(proposer, drafters, (tokens[start:], taps[start:]))
    expected = tree_of_variant(head, target, tokens.tolist(), taps)
    for draft in drafts:
        tree = draft.candidates
        found = {token_path(tree, row): float(tree.logp_N[row]) for row in range(1, len(tree))}
        assert found.keys() == expected.keys()
        for path, score in expected.items():
            assert found[path] == pytest.approx(score, abs=1e-3)


def begin_and_deepen(proposer, drafters, fresh):
    count = len(drafters)
    drafts = proposer.begin(drafters, [fresh] * count, [fresh[0][-1:]] * count, [None] * count)
    for _ in range(PASSES - 1):
        drafts = proposer.deepen(drafters, drafts)
    return drafts


def on_fixed_buffers(proposer, drafter, tokens, taps):
    """What the captured rounds make of a request's own drafter, with more positions pending."""
    fixed = proposer.open(BEAM, PASSES, 64).fix(rows=LENGTH)
    fixed.adopt(drafter, tokens[:1], taps[:1])
    fixed.fixed.append(tokens[1:], taps[1:], torch.tensor([len(tokens) - 1]))
    return fixed

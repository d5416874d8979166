"""The loss of blocks: what its drafts are taught, and its value and gradients against the textbook's."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft_train.config.block import BLOCK_LOSSES
from graft_train.distill.block import loss as loss_module
from graft_train.distill.block.blocks import draft_blocks
from graft_train.distill.block.loss import BlockLoss, block_loss, d_pace_weights, taught_drafts
from graft_train.distill.teacher import final_state_teacher

from .pair import VOCAB, WIDTH
from .test_block import SLOTS, START, block_head, head_inputs, layout_of


@pytest.mark.parametrize("sample_from_anchor", [False, True])
def test_the_first_draft_is_taught_the_token_behind_the_anchor_in_both_layouts(sample_from_anchor):
    config = block_head(sample_from_anchor=sample_from_anchor).config
    layout = layout_of(drafts=config.drafts)
    tokens_S, choice_S = torch.arange(len(START)), torch.arange(100, 100 + len(START))
    taught = taught_drafts(layout, tokens_S, choice_S, torch.arange(200), 200)
    anchors_A = layout.anchors_A
    assert config.drafts == SLOTS - (not sample_from_anchor)
    assert torch.equal(taught.label_AK[:, 0], anchors_A + 1)
    assert torch.equal(taught.token_AK[:, 0], anchors_A)
    assert torch.equal(taught.choice_AK[:, 0], anchors_A + 100)  # what the target foresees at the anchor
    assert torch.equal(taught.label_AK[taught.started_AK], (taught.before_AK + 1)[taught.started_AK])
    # The slot that stands for it: in a causal block, the first one that may predict has seen nothing but the anchor.
    head = block_head(causal=True, sample_from_anchor=sample_from_anchor)
    embedding_SH, mask_H, aux_SE = head_inputs()
    with torch.no_grad():
        hidden = draft_blocks(head, embedding_SH, mask_H, aux_SE, layout_of(drafts=head.config.drafts))
        other = draft_blocks(head, embedding_SH, mask_H + 1, aux_SE, layout_of(drafts=head.config.drafts))
    assert torch.equal(hidden[:, 0], other[:, 0]) == sample_from_anchor


@given(st.integers(0, 2**32), st.sets(st.integers(0, 3), min_size=1))
def test_a_draft_is_in_the_loss_where_the_vocabulary_has_its_token_and_the_targets_choice(seed, kept):
    """Tokens and choices of few kinds: whatever place the vocabulary has for them, the first one, too."""
    layout, ids = layout_of(), sorted(kept)
    tokens_S, choice_S = torch.randint(4, (2, len(START)), generator=torch.Generator().manual_seed(seed))
    taught = taught_drafts(layout, tokens_S, choice_S, torch.tensor(ids), 4)
    for place, anchor in enumerate(layout.anchors_A.tolist()):
        for draft in layout.started_AK[place].nonzero().flatten().tolist():
            token, choice = int(tokens_S[anchor + draft + 1]), int(choice_S[anchor + draft])
            assert bool(taught.trained_AK[place, draft]) == (token in kept and choice in kept)
            assert token not in kept or int(taught.label_AK[place, draft]) == ids.index(token)
    assert torch.equal(taught.started_AK, layout.started_AK)
    assert not (taught.trained_AK & ~taught.started_AK).any()


def loss_parts(markov=False, reduced=False):
    changes = {"sample_from_anchor": True, "markov_rank": 3} if markov else {}
    head = block_head(draft_vocab_size=16 if reduced else VOCAB, **changes)
    layout = layout_of(drafts=head.config.drafts)
    generator = torch.Generator().manual_seed(5)
    tokens_S = torch.randint(VOCAB, (len(START),), generator=generator)
    final_SH = torch.randn(len(START), WIDTH, generator=generator)
    lm_head_VH = torch.randn(VOCAB, WIDTH, generator=generator)
    hidden = torch.randn(*layout.started_AK.shape, WIDTH, generator=generator, requires_grad=True)
    choice_S = (final_SH @ lm_head_VH.T).argmax(-1)
    taught = taught_drafts(layout, tokens_S, choice_S, head.target_ids, VOCAB)
    return head, layout, tokens_S, final_SH, lm_head_VH[head.target_ids], hidden, taught


def reference_loss(parts, coefficient, name, d_pace):
    """Draft by draft, by the textbook; gradients by autograd. And the sum of each draft's plain losses."""
    head, layout, tokens_S, final_SH, rows_DH, hidden, taught = parts
    kept = set(head.target_ids.tolist())
    total, sums = hidden.new_zeros(()), [0.0] * layout.started_AK.shape[1]
    for place, anchor in enumerate(layout.anchors_A.tolist()):
        values, known = [], []
        for draft in range(layout.started_AK.shape[1]):
            label = tokens_S[anchor + 1 + draft].item() if layout.started_AK[place, draft] else -1
            if label not in kept or taught.choice_AK[place, draft].item() not in kept:
                values.append(None)
                known.append(None)
                continue
            logits = hidden[place, draft] @ rows_DH.T
            if head.markov_head is not None:
                logits = logits + head.markov_bias(tokens_S[anchor + draft])
            logq, logp = logits.log_softmax(-1), (final_SH[anchor + draft] @ rows_DH.T).log_softmax(-1)
            hard = -logq[head.target_ids.tolist().index(label)]
            distance = (logp.exp() - logq.exp()).abs().sum()
            values.append(
                {
                    "cross_entropy": hard,
                    "forward_kl": (logp.exp() * (logp - logq)).sum(),
                    "reverse_kl": (logq.exp() * (logq - logp)).sum(),
                    "total_variation": distance / 2,
                    "dspark": 0.1 * hard + 0.9 * distance,
                }[name]
            )
            known.append(hard.detach().neg().exp().item())
        for draft, value in enumerate(values):
            if value is None:
                continue
            sums[draft] += value.item()
            weight = 1.0
            if d_pace is not None:
                factors = [1 if one is None else (1 - d_pace) * one + d_pace for one in known]
                weight = sum(math.prod(factors[: m + 1]) for m in range(draft, len(values)) if known[m] is not None)
            total = total + coefficient[draft] * weight * value
    return total, sums


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("markov", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(("name", "d_pace"), [*((name, None) for name in BLOCK_LOSSES), ("cross_entropy", 0.5)])
def test_chunked_loss_is_the_plain_one_with_its_gradients(monkeypatch, chunk, markov, reduced, name, d_pace):
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    parts = loss_parts(markov, reduced)
    head, _, _, final_SH, rows_DH, hidden, taught = parts
    coefficient_K = torch.tensor([1.0, 0.6, 0.3, 0.1][: taught.started_AK.shape[1]])
    learned = [hidden, *(head.markov_head.parameters() if markov else ())]
    loss, sums = block_loss(
        head, hidden, rows_DH, final_state_teacher(final_SH, rows_DH), taught, coefficient_K, BlockLoss(name, d_pace)
    )
    expected, values_K = reference_loss(parts, coefficient_K.tolist(), name, d_pace)
    assert sums.loss_K.tolist() == pytest.approx(values_K, rel=1e-4)
    assert not sums.loss_K.requires_grad
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(loss, learned)
    for got, plain in zip(gradients, torch.autograd.grad(expected, learned), strict=True):
        torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-4)
    assert sums.started_K.tolist() == taught.started_AK.sum(0).tolist()
    assert (sums.trained_K < sums.started_K).all() == reduced


def test_d_pace_weighs_a_draft_by_what_it_adds_to_the_expected_length():
    confidence = torch.tensor([[0.5, 0.2, 0.9]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    first, second, third = 0.75, 0.75 * 0.6, 0.75 * 0.6 * 0.95
    expected = torch.tensor([[first + second + third, second + third, third]])
    torch.testing.assert_close(d_pace_weights(confidence, everything, 0.5), expected)
    left_out = torch.tensor([[True, False, True]])
    expected = torch.tensor([[0.75 + 0.75 * 0.95, 0.75 * 0.95, 0.75 * 0.95]])
    torch.testing.assert_close(d_pace_weights(confidence, left_out, 0.5), expected)


@pytest.mark.parametrize("perfect", [False, True])
def test_acceptance_is_counted_along_the_block(perfect):
    """Up to the first miss, and never past the block's end."""
    head, layout, _, final_SH, rows_DH, hidden, taught = loss_parts()
    if perfect:
        taught = replace(taught, choice_AK=head.target_ids[(hidden @ rows_DH.T).argmax(-1)])
    coefficient_K = torch.ones(3)
    _, sums = block_loss(
        head, hidden, rows_DH, final_state_teacher(final_SH, rows_DH), taught, coefficient_K, BlockLoss("forward_kl")
    )
    drafted = (hidden @ rows_DH.T).argmax(-1).tolist()
    counts = {name: [0, 0, 0] for name in ("matched", "chained", "reached")}
    for place in range(len(layout.anchors_A)):
        alive = True
        for draft in range(3):
            if not layout.started_AK[place, draft]:
                break
            matches = drafted[place][draft] == taught.choice_AK[place, draft]
            counts["matched"][draft] += matches
            counts["reached"][draft] += alive
            alive = alive and bool(matches)
            counts["chained"][draft] += alive
    assert sums.matched_K.tolist() == counts["matched"]
    assert sums.chained_K.tolist() == counts["chained"]
    assert sums.reached_K.tolist() == counts["reached"]


def test_what_drafts_are_taught_lies_on_the_device_of_the_batch():
    """Shown on the device without memory, which refuses what lies on the CPU, as a GPU does."""
    meta = torch.device("meta")
    tokens_S = torch.zeros(len(START), dtype=torch.long, device=meta)
    taught = taught_drafts(layout_of().to(meta), tokens_S, tokens_S, torch.zeros(9, dtype=torch.long, device=meta), 31)
    assert all(one.is_meta for one in vars(taught).values())


@pytest.mark.parametrize("name", [one for one in BLOCK_LOSSES if one != "total_variation"])  # whose gradient jumps
def test_a_head_that_is_bf16_itself_learns_nearly_the_same(monkeypatch, name):
    """As DeepSpeed trains it; the products are bf16, and what is summed over chunks is not."""
    monkeypatch.setattr(loss_module, "CHUNK", 8)
    head, _, _, final_SH, rows_DH, hidden, taught = loss_parts(markov=True)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        head, learned = head.to(dtype), [hidden.detach().to(dtype).requires_grad_()]
        learned += head.markov_head.parameters()
        teacher, coefficient_K = final_state_teacher(final_SH, rows_DH), torch.ones(taught.started_AK.shape[1])
        loss, sums = block_loss(head, learned[0], rows_DH.to(dtype), teacher, taught, coefficient_K, BlockLoss(name))
        assert (loss.dtype, sums.loss_K.dtype) == (torch.float32, torch.float32)
        found = torch.autograd.grad(loss, learned)
        assert {one.dtype for one in found} == {dtype}
        gradients.append([one.float() for one in found])
    for plain, rough in zip(*gradients, strict=True):
        assert (rough - plain).norm() < 0.03 * plain.norm()

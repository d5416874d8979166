"""The unroll: its attention, its shifts, and that it trains what a server's draft chain runs."""

import pytest
import torch
from torch.nn import functional as F

from graft_inference.drafting import Drafter
from graft_inference.target import Target
from graft_train.data.states import TappedTarget
from graft_train.distill.unroll import merged_attention, reference_attention, unroll

from .pair import VOCAB, tiny_head, tiny_target


def loop_attention(query_QCD, keys, values):
    """One query at a time, one row of the batch: the words of the contract."""
    queries, columns, size = query_QCD.shape
    length, groups = keys[0].shape[1], queries // keys[0].shape[0]
    out = torch.empty_like(query_QCD)
    for head in range(queries):
        for place in range(columns):
            column = length - columns + place
            seen_k = [keys[0][head // groups, : column + 1]] + [k[head // groups, place][None] for k in keys[1:]]
            seen_v = [values[0][head // groups, : column + 1]] + [v[head // groups, place][None] for v in values[1:]]
            scores = torch.cat(seen_k) @ query_QCD[head, place] / size**0.5
            out[head, place] = scores.softmax(0) @ torch.cat(seen_v)
    return out


def random_attention_inputs(later: int, columns: int, dtype=torch.float64):
    torch.manual_seed(later)
    rows, length, size = 2, 7, 8
    query = torch.randn(rows, 4, columns, size, dtype=dtype, requires_grad=True)
    widths = [length] + [columns] * later
    keys = [torch.randn(rows, 2, width, size, dtype=dtype, requires_grad=True) for width in widths]
    values = [torch.randn(rows, 2, width, size, dtype=dtype, requires_grad=True) for width in widths]
    return query, keys, values


@pytest.mark.parametrize(("later", "columns"), [(0, 7), (1, 7), (3, 7), (3, 4), (1, 1)])
def test_reference_sees_causal_step_0_and_its_own_column(later, columns):
    query, keys, values = random_attention_inputs(later, columns)
    out = reference_attention(query, keys, values)
    for row in range(2):
        expected = loop_attention(query[row], [k[row] for k in keys], [v[row] for v in values])
        torch.testing.assert_close(out[row], expected)


@pytest.mark.parametrize(("later", "columns"), [(0, 7), (1, 7), (3, 7), (3, 4), (1, 1)])
def test_merged_attention_is_the_reference_forward_and_backward(later, columns):
    query, keys, values = random_attention_inputs(later, columns, torch.float32)
    upstream = torch.randn_like(query)
    results = []
    for attention in (reference_attention, merged_attention):
        out = attention(query, keys, values)
        results.append((out, *torch.autograd.grad(out, [query, *keys, *values], upstream)))
    for fast, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("columns", [7, 4])
def test_merged_attention_in_bf16_stays_near_fp32(columns):
    query, keys, values = random_attention_inputs(3, columns, torch.float32)
    results = []
    for dtype, attention in ((torch.float32, reference_attention), (torch.bfloat16, merged_attention)):
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (query, *keys, *values)]
        out = attention(inputs[0], inputs[1:5], inputs[5:])
        results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    for fast, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(fast.float(), plain, atol=0.06, rtol=0.06)


def head_inputs(rows: int = 2, length: int = 9):
    target, head = TappedTarget(tiny_target(), (0, 2, 3)), tiny_head()
    tokens_BS = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(4))
    return head, tokens_BS, target.embed(tokens_BS), target.states(tokens_BS).taps_BSE


@pytest.mark.parametrize("first", [0, 1, 4])
def test_columns_before_the_first_draft_only_lend_their_keys(first):
    head, _, embedding_BSH, taps_BSE = head_inputs()
    whole = unroll(head, embedding_BSH, taps_BSE, 4, attention=reference_attention)
    cut = unroll(head, embedding_BSH, taps_BSE, 4, first)
    for step in range(4):
        torch.testing.assert_close(cut[step], whole[step][:, first:], atol=1e-5, rtol=1e-4)


def test_step_k_reads_the_token_and_position_k_further_on():
    head, _, embedding_BSH, taps_BSE = head_inputs()
    seen = []
    head.midlayer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    outputs = unroll(head, embedding_BSH, taps_BSE, 3)
    features = [head.fuse(taps_BSE), *outputs]
    for step, (embedding, feature, rope, _) in enumerate(seen):
        # Token t+1+k beside the head's previous output at t, at RoPE position t+k.
        torch.testing.assert_close(embedding[:, : 8 - step], embedding_BSH[:, 1 + step :])
        torch.testing.assert_close(feature, features[step])
        expected = head.rotary_emb(embedding_BSH, torch.arange(step, 9 + step)[None])
        torch.testing.assert_close(rope[0], expected[0])


def test_one_token_rows_and_steps_past_the_end_keep_their_shape():
    head, _, embedding_BSH, taps_BSE = head_inputs(length=2)
    assert [tuple(out.shape) for out in unroll(head, embedding_BSH, taps_BSE, 5)] == [(2, 2, 16)] * 5


def test_padding_on_the_right_changes_nothing():
    head, _, embedding_BSH, taps_BSE = head_inputs(rows=1)
    alone = unroll(head, embedding_BSH, taps_BSE, 2)
    padded = unroll(head, F.pad(embedding_BSH, (0, 0, 0, 5), value=3.0), F.pad(taps_BSE, (0, 0, 0, 5), value=-2.0), 2)
    for step in range(2):
        real = 9 - 1 - step  # later columns read past the end of the row
        torch.testing.assert_close(padded[step][:, :real], alone[step][:, :real], atol=1e-5, rtol=1e-5)


def test_unroll_equals_the_chain_that_a_server_drafts():
    """From t, drafting the row's own tokens: trained states and served states are the same."""
    model, head = tiny_target(), tiny_head(list(range(VOCAB))).eval()
    tapped = TappedTarget(model, (0, 2, 3))
    tokens_1S = torch.randint(VOCAB, (1, 12), generator=torch.Generator().manual_seed(5))
    taps_BSE = tapped.states(tokens_1S).taps_BSE
    outputs = unroll(head, tapped.embed(tokens_1S), taps_BSE, 4)
    start = 6  # the last position whose states the server has
    with torch.no_grad():
        drafter = Drafter(head, Target(model, (0, 2, 3)), beam_width=1, capacity=32)
        draft = drafter.begin(tokens_1S[0, 1 : start + 2], taps_BSE[0, : start + 1])
        features = [draft.features_kH]
        for step in range(1, 4):
            # Force the row's own token into the beam, as teacher forcing does.
            draft.candidates.tokens_N[draft.beam_k] = tokens_1S[0, start + 1 + step]
            draft = drafter.deepen(draft)
            features.append(draft.features_kH)
    for step in range(4):
        torch.testing.assert_close(features[step][0], outputs[step][0, start], atol=1e-5, rtol=1e-4)

"""The unroll: its attention, its shifts, its documents, and that it trains what a server's draft chain runs."""

import pytest
import torch

from graft_inference.heads.eagle3.drafter import Eagle3Proposer
from graft_inference.target.model import Target
from graft_train.data.states import PackedTarget
from graft_train.distill.eagle3.attention import flex_attention, merged_attention, reference_attention
from graft_train.distill.eagle3.layout import make_layout
from graft_train.distill.eagle3.unroll import unroll
from tests.graft_inference.plain_head import VARIANTS, varied

from .pair import VOCAB, plain_unroll, tiny_head, tiny_target

# Three documents: two answers in the second, one that is answer from its first token on.
LENGTHS = [6, 8, 4]
ANSWER_S = torch.tensor([0, 0, 1, 1, 1, 1] + [0, 1, 1, 1, 0, 1, 1, 1] + [1, 1, 1, 1], dtype=torch.bool)
LAYOUT = make_layout(LENGTHS, ANSWER_S)
START = [0] * 6 + [6] * 8 + [14] * 4
WINDOWED = make_layout(LENGTHS, ANSWER_S, window=3)


def loop_attention(query_QCD, keys, values, window=None):
    """One query at a time: the words of the contract."""
    queries, columns, size = query_QCD.shape
    groups = queries // keys[0].shape[0]
    out = torch.empty_like(query_QCD)
    for head in range(queries):
        for place in range(columns):
            column = int(LAYOUT.columns_C[place])
            seen = slice(max(START[column], column + 1 - (window or 99)), column + 1)
            seen_k = [keys[0][head // groups, seen]] + [k[head // groups, place][None] for k in keys[1:]]
            seen_v = [values[0][head // groups, seen]] + [v[head // groups, place][None] for v in values[1:]]
            scores = torch.cat(seen_k) @ query_QCD[head, place] / size**0.5
            out[head, place] = scores.softmax(0) @ torch.cat(seen_v)
    return out


def random_attention_inputs(later: int, dtype=torch.float64):
    torch.manual_seed(later)
    size, columns = 8, len(LAYOUT.columns_C)
    query = torch.randn(1, 4, columns, size, dtype=dtype, requires_grad=True)
    widths = [sum(LENGTHS)] + [columns] * later
    keys = [torch.randn(1, 2, width, size, dtype=dtype, requires_grad=True) for width in widths]
    values = [torch.randn(1, 2, width, size, dtype=dtype, requires_grad=True) for width in widths]
    return query, keys, values


@pytest.mark.parametrize("later", [0, 1, 3])
@pytest.mark.parametrize("layout", [LAYOUT, WINDOWED], ids=["full", "windowed"])
def test_reference_sees_its_document_causally_and_its_own_column(later, layout):
    query, keys, values = random_attention_inputs(later)
    out = reference_attention(query, keys, values, layout)
    expected = loop_attention(query[0], [k[0] for k in keys], [v[0] for v in values], layout.window)
    torch.testing.assert_close(out[0], expected)


def forward_and_gradients(attention, query, keys, values, layout=LAYOUT):
    out = attention(query, keys, values, layout)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return (out, *torch.autograd.grad(out, [query, *keys, *values], upstream))


@pytest.mark.parametrize("layout", [LAYOUT, WINDOWED], ids=["full", "windowed"])
@pytest.mark.parametrize("later", [0, 1, 3])
def test_merged_attention_is_the_reference_forward_and_backward(later, layout):
    inputs = random_attention_inputs(later, torch.float32)
    expected = forward_and_gradients(reference_attention, *inputs, layout)
    for got, plain in zip(forward_and_gradients(merged_attention, *inputs, layout), expected, strict=True):
        torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [LAYOUT, WINDOWED], ids=["full", "windowed"])
@pytest.mark.parametrize("later", [0, 1, 3])
def test_flex_attention_is_the_reference_forward(later, layout):
    """Its backward runs on a GPU only."""
    inputs = random_attention_inputs(later, torch.float32)
    with torch.no_grad():
        query, *rest = (
            inputs[0].detach(),
            [key.detach() for key in inputs[1]],
            [value.detach() for value in inputs[2]],
        )
        expected = reference_attention(query, *rest, layout)
        torch.testing.assert_close(flex_attention(query, *rest, layout), expected, atol=1e-5, rtol=1e-5)


def test_the_block_mask_is_built_once_for_all_steps(monkeypatch):
    from torch.nn.attention import flex_attention as flex

    built, create = [], flex.create_block_mask
    monkeypatch.setattr(flex, "create_block_mask", lambda *a, **k: built.append(1) or create(*a, **k))
    head, embedding_SH, aux_SE = head_inputs()
    layout = make_layout(LENGTHS, ANSWER_S)
    with torch.no_grad():
        unroll(head, embedding_SH, aux_SE, layout, 3, flex_attention)
    assert len(built) == 1


@pytest.mark.parametrize("window", [None, 1, 64, 301, 699])
def test_merged_attention_in_long_documents_is_the_reference(window):
    """Longer than flash attention's blocks, with a prompt and an answer that end inside one; and than a band."""
    lengths = [700, 90, 333]
    loss_mask_S = torch.zeros(sum(lengths), dtype=torch.bool)
    loss_mask_S[300:700] = loss_mask_S[750:790] = loss_mask_S[1000:1100] = True
    layout = make_layout(lengths, loss_mask_S, window)
    torch.manual_seed(0)
    query = torch.randn(1, 2, len(layout.columns_C), 16, requires_grad=True)
    widths = [sum(lengths), len(layout.columns_C)]
    keys = [torch.randn(1, 1, width, 16, requires_grad=True) for width in widths]
    values = [torch.randn(1, 1, width, 16, requires_grad=True) for width in widths]
    expected = forward_and_gradients(reference_attention, query, keys, values, layout)
    got = forward_and_gradients(merged_attention, query, keys, values, layout)
    for fast, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)


def test_merged_attention_in_bf16_stays_near_fp32():
    query, keys, values = random_attention_inputs(3, torch.float32)
    results = []
    for dtype, attention in ((torch.float32, reference_attention), (torch.bfloat16, merged_attention)):
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (query, *keys, *values)]
        out = attention(inputs[0], inputs[1:5], inputs[5:], LAYOUT)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    for fast, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(fast.float(), plain, atol=0.06, rtol=0.06)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [LAYOUT, WINDOWED], ids=["full", "windowed"])
@pytest.mark.parametrize("later", [0, 3])
def test_compiled_flex_attention_is_the_reference(later, layout):
    layout = layout.to(torch.device("cuda"))
    query, keys, values = random_attention_inputs(later, torch.float32)
    moved = [tensor.detach().cuda().requires_grad_() for tensor in (query, *keys, *values)]
    inputs = (moved[0], moved[1 : 2 + later], moved[2 + later :])
    expected = forward_and_gradients(reference_attention, *inputs, layout)
    for got, plain in zip(forward_and_gradients(flex_attention, *inputs, layout), expected, strict=True):
        torch.testing.assert_close(got, plain, atol=1e-4, rtol=1e-4)


def head_inputs(**changes):
    target, head = PackedTarget(tiny_target(), (0, 2, 3)), varied(tiny_head(**changes))
    tokens_S = torch.randint(VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(4))
    return head, target.embed(tokens_S), target.states(tokens_S, LENGTHS).aux_SE


def test_each_document_unrolls_as_if_it_were_alone():
    """Documents before and after it, and the columns in which no draft starts, change nothing."""
    head, embedding_SH, aux_SE = head_inputs()
    packed = unroll(head, embedding_SH, aux_SE, LAYOUT, 3)
    for document, start in enumerate((0, 6, 14)):
        part = slice(start, start + LENGTHS[document])
        layout = make_layout([LENGTHS[document]], ANSWER_S[part])
        alone = unroll(head, embedding_SH[part], aux_SE[part], layout, 3, reference_attention)
        chosen = LAYOUT.document_S[LAYOUT.columns_C] == document
        for step in range(3):
            # Later steps read past the document's end in columns that no longer count.
            counts = layout.columns_C + 1 + step < LENGTHS[document]
            torch.testing.assert_close(packed[step][chosen][counts], alone[step][counts], atol=1e-5, rtol=1e-4)


def test_step_k_reads_the_token_k_further_on_and_none_behind_it():
    head, embedding_SH, aux_SE = head_inputs()
    outputs, place = unroll(head, embedding_SH, aux_SE, LAYOUT, 3), 1
    for step in range(3):
        changed_SH = embedding_SH.clone()
        changed_SH[LAYOUT.columns_C[place] + 1 + step] += 1
        others = unroll(head, changed_SH, aux_SE, LAYOUT, 3)
        changed = [not torch.allclose(other[place], one[place]) for other, one in zip(others, outputs, strict=True)]
        assert changed == [later >= step for later in range(3)]


def test_a_row_without_drafts_trains_nothing_and_does_not_fail():
    head, embedding_SH, aux_SE = head_inputs()
    layout = make_layout(LENGTHS, torch.zeros(sum(LENGTHS), dtype=torch.bool))
    outputs = unroll(head, embedding_SH, aux_SE, layout, 3)
    assert [tuple(output.shape) for output in outputs] == [(0, 16)] * 3
    sum(output.sum() for output in outputs).backward()
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("attention", [reference_attention, merged_attention])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_the_unroll_of_every_variant_is_the_plain_heads_chains(changes, attention):
    """Every column of every document, as far as its own tokens go."""
    head, embedding_SH, aux_SE = head_inputs(**changes)
    layout = make_layout(LENGTHS, ANSWER_S, head.config.sliding_window)
    outputs = unroll(head, embedding_SH, aux_SE, layout, 3, attention)
    for step, expected in enumerate(plain_unroll(head, embedding_SH, aux_SE, layout, 3)):
        inside = expected.any(dim=1)
        assert inside.sum() > 4
        torch.testing.assert_close(outputs[step][inside], expected[inside], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_unroll_equals_the_chain_that_a_server_drafts(changes):
    """From t, drafting the row's own tokens: trained states and served states are the same."""
    model, head = tiny_target(), varied(tiny_head(list(range(VOCAB)), **changes)).eval()
    tapped = PackedTarget(model, (0, 2, 3))
    tokens_S = torch.randint(VOCAB, (12,), generator=torch.Generator().manual_seed(5))
    aux_SE = tapped.states(tokens_S, [12]).aux_SE
    start = 6  # the last position whose states the server has
    layout = make_layout([12], torch.arange(12) > start, head.config.sliding_window)
    outputs = unroll(head, tapped.embed(tokens_S), aux_SE, layout, 4)
    with torch.no_grad():
        target = Target(model, (0, 2, 3))
        proposer = Eagle3Proposer(head, target.embed, target.max_positions)
        drafter, seen_A = proposer.open(topk=1, num_steps=4, tokens=28), tokens_S[1 : start + 2]
        (draft,) = proposer.begin([drafter], [(seen_A, aux_SE[: start + 1])], [seen_A[-1:]], [None])
        features = [draft.layers[0].hidden_AH]
        for step in range(1, 4):
            # Force the row's own token into the beam, as teacher forcing does.
            draft.layers[-1].tokens_C.fill_(tokens_S[start + 1 + step])
            (draft,) = proposer.deepen([drafter], [draft])
            features.append(draft.layers[-1].hidden_AH)
    for step in range(4):
        torch.testing.assert_close(features[step][0], outputs[step][0], atol=1e-5, rtol=1e-4)

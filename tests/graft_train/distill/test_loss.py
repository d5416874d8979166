"""Masks, shifts and denominators on hand-made samples, and the chunked losses against the plain ones."""

import math

import pytest
import torch
from torch.fx.experimental import _config as fx_config
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graft_train.data import states as states_module
from graft_train.data.states import PackedTarget
from graft_train.distill.divergence import LOSSES
from graft_train.distill.eagle3 import loss as loss_module
from graft_train.distill.eagle3.layout import make_layout
from graft_train.distill.eagle3.loss import distillation_loss, reference_loss, taught_positions
from graft_train.distill.eagle3.unroll import unroll
from graft_train.distill.metrics import StepSums
from graft_train.distill.teacher import ABSENT, final_state_teacher, product, teacher_of, top_logits_teacher
from tests.graft_inference.plain_head import VARIANTS, varied

from .pair import VOCAB, plain_unroll, tiny_head, tiny_target

# Document 0: prompt 0..2, answer 3..6, then a user's turn. Document 1, at 8: prompt 8, answer 9..15.
# Document 2, at 16: answers 17..19 and, after one token, 21..23.
LENGTHS = [8, 8, 8]
ANSWER_S = torch.tensor(
    [0, 0, 0, 1, 1, 1, 1, 0] + [0, 1, 1, 1, 1, 1, 1, 1] + [0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.bool
)
LAYOUT = make_layout(LENGTHS, ANSWER_S)


def drafts(taught):
    """{(t, step)} of everything that counts."""
    return {(taught.index_N[place].item() - 1 - step, step) for place, step in taught.started_NK.nonzero().tolist()}


def test_mask_is_shifted_with_the_targets_and_stays_in_one_answer():
    taught = taught_positions(LAYOUT, torch.zeros(24, dtype=torch.long), None, steps=3)
    answers = [(3, 6), (9, 15), (17, 19), (21, 23)]
    expected = {
        (t, k) for first, last in answers for k in range(3) for t in range(24) if first <= t + 1 and t + 2 + k <= last
    }
    assert drafts(taught) == expected
    # The server's first draft, right before the answer, is taught; drafts that start in the prompt are not.
    assert {t for t, k in expected if t < 8} == {2, 3, 4}
    assert (2, 2) in drafts(taught)  # token 3 -> 6, the end of the answer
    assert (3, 2) not in drafts(taught)  # 7 is the user's
    assert (17, 2) not in drafts(taught)  # from one answer of a document to its next


def test_without_a_prompt_no_draft_starts_before_the_document():
    layout = make_layout([4], torch.ones(4, dtype=torch.bool))
    taught = taught_positions(layout, torch.zeros(4, dtype=torch.long), None, 2)
    assert drafts(taught) == {(0, 0), (1, 0), (0, 1)}


@pytest.mark.parametrize("skip", [True, False])
def test_out_of_vocabulary_choices_leave_the_loss_but_not_the_metrics(skip):
    kept_V = torch.tensor([True, True, False])
    choice_S = torch.zeros(24, dtype=torch.long)
    choice_S[4] = 2  # position j=4 is the teacher of steps 0 and 1
    taught = taught_positions(LAYOUT, choice_S, kept_V, steps=2, skip_out_of_vocabulary=skip)
    lost = taught.started_NK & ~taught.trained_NK
    assert taught.started_NK.sum(0).tolist() == [3 + 6 + 2 + 2, 2 + 5 + 1 + 1]
    assert lost.sum(0).tolist() == ([1, 1] if skip else [0, 0])
    assert taught.index_N[lost.any(1)].tolist() == ([4] if skip else [])


def test_empty_mask_gives_zero_and_no_nan():
    loss, sums, gradients = run(torch.zeros(24, dtype=torch.bool))
    assert loss.item() == 0
    assert sums.metrics().acceptance_length == 1
    assert sums.metrics().loss == [0, 0, 0]
    assert not any(gradient.any() for gradient in gradients.values() if gradient is not None)


def run(loss_mask_S=ANSWER_S, kept=None, skip=True, coefficient=(1.0, 0.4, 0.1), name="forward_kl", top=None):
    """The loss, its sums, and gradients of all head parameters."""
    target, head = PackedTarget(tiny_target(), (0, 2, 3)), tiny_head(kept)
    tokens_S = torch.randint(VOCAB, (24,), generator=torch.Generator().manual_seed(4))
    states, layout = target.states(tokens_S, LENGTHS, top), make_layout(LENGTHS, loss_mask_S)
    taught = taught_positions(layout, states.choice_S, getattr(head, "t2d", None), 3, skip)
    outputs = unroll(head, target.embed(tokens_S), states.aux_SE, layout, 3)
    if top is None:
        teacher = final_state_teacher(states.final_SH, target.lm_head_VH[head.target_ids])
    else:
        teacher = top_logits_teacher(states.top_ids_SM, states.top_logits_SM, head.target_ids, VOCAB)
    loss, sums = distillation_loss(head, outputs, teacher, taught, torch.tensor(coefficient), name)
    loss.backward()
    return loss, sums, {parameter: p.grad for parameter, p in head.named_parameters()}


def run_reference(kept=None, skip=True, coefficient=(1.0, 0.4, 0.1), name="forward_kl", top=VOCAB):
    """The target's logits of each document alone."""
    model = tiny_target()
    tokens_S = torch.randint(VOCAB, (24,), generator=torch.Generator().manual_seed(4))
    logits_SV = torch.cat([model(tokens[None]).logits[0] for tokens in tokens_S.split(LENGTHS)])
    logits_SV = logits_SV.masked_fill(logits_SV < logits_SV.sort(descending=True).values[:, top - 1, None], -1e9)
    target, head = PackedTarget(model, (0, 2, 3)), tiny_head(kept)
    outputs = unroll(head, target.embed(tokens_S), target.states(tokens_S, LENGTHS).aux_SE, LAYOUT, 3)
    loss = reference_loss(head, outputs, logits_SV, LAYOUT, ANSWER_S, list(coefficient), name, skip)
    loss.backward()
    return loss, {parameter: p.grad for parameter, p in head.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 4, 512])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kept", [None, list(range(VOCAB))])
@pytest.mark.parametrize("name", LOSSES)
def test_chunked_loss_is_the_plain_one_with_its_gradients(monkeypatch, chunk, skip, kept, name):
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    loss, sums, gradients = run(kept=kept, skip=skip, name=name)
    assert not sums.loss_K.requires_grad
    expected, expected_gradients = run_reference(kept, skip, name=name)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[parameter], gradient, atol=1e-5, rtol=1e-4, msg=parameter)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_head_has_the_plain_heads_loss_and_gradients(changes):
    """From the layout to the gradients of all parameters; the plain head's by autograd through its loops."""
    model, target = tiny_target(), PackedTarget(tiny_target(), (0, 2, 3))
    tokens_S = torch.randint(VOCAB, (24,), generator=torch.Generator().manual_seed(4))
    states, embedding_SH, weights = target.states(tokens_S, LENGTHS), target.embed(tokens_S), [1.0, 0.4, 0.1]
    head, plain = (varied(tiny_head(**changes)) for _ in range(2))
    layout = make_layout(LENGTHS, ANSWER_S, head.config.sliding_window)
    taught = taught_positions(layout, states.choice_S, head.t2d, 3)
    teacher = final_state_teacher(states.final_SH, target.lm_head_VH[head.target_ids])
    outputs = unroll(head, embedding_SH, states.aux_SE, layout, 3)
    loss, _ = distillation_loss(head, outputs, teacher, taught, torch.tensor(weights))
    loss.backward()
    logits_SV = torch.cat([model(tokens[None]).logits[0] for tokens in tokens_S.split(LENGTHS)])
    outputs = plain_unroll(plain, embedding_SH, states.aux_SE, layout, 3)
    expected = reference_loss(plain, outputs, logits_SV, layout, ANSWER_S, weights)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for (name, got), wanted in zip(head.named_parameters(), plain.parameters(), strict=True):
        assert wanted.grad.any(), name
        torch.testing.assert_close(got.grad, wanted.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("top", [1, 5, VOCAB])
@pytest.mark.parametrize("name", ["forward_kl", "total_variation", "survival"])
def test_a_teacher_of_the_best_logits_is_the_plain_one_cut_off_and_normalised(name, top):
    loss, sums, gradients = run(name=name, top=top)
    expected, expected_gradients = run_reference(name=name, top=top)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[parameter], gradient, atol=1e-5, rtol=1e-4, msg=parameter)
    whole_loss, whole_sums, _ = run(name=name)
    assert torch.isclose(loss, whole_loss, rtol=1e-5) == (top == VOCAB)
    assert torch.equal(sums.matched_K, whole_sums.matched_K)


@pytest.mark.filterwarnings("error")  # as of memory that had to grow
def test_logits_exist_a_chunk_at_a_time(monkeypatch):
    """Of the target as of the head, forward and backward."""
    monkeypatch.setattr(loss_module, "CHUNK", 6)
    monkeypatch.setattr(states_module, "CHUNK", 6)
    with LargestRows(VOCAB) as seen:
        run(kept=list(range(VOCAB)))
    assert seen.rows == 6 * 3  # positions and steps; all would be 13 * 3


class LargestRows(TorchDispatchMode):
    """The most rows that any tensor of this width has, and where such tensors lie."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0
        self.memory: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.width:
                self.rows = max(self.rows, tensor.numel() // self.width)
                self.memory.add(tensor.data_ptr())
        return out


def test_a_product_is_that_of_linear_in_the_memory_given():
    """New memory only where the product is rounded on its way, as under autocast."""
    states_CH, weight_DH = torch.randn(4, 16, generator=torch.Generator().manual_seed(3)), torch.eye(7, 16) / 3
    out_CD, linear = torch.empty(4, 7), F.linear(states_CH, weight_DH)
    with LargestRows(7) as seen:
        found = product(states_CH, weight_DH, out_CD)
    assert found.data_ptr() == out_CD.data_ptr()
    assert seen.memory <= {out_CD.data_ptr(), weight_DH.data_ptr()}, "of the transposed weight"
    torch.testing.assert_close(found, linear)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = F.linear(states_CH, weight_DH)
        assert torch.equal(product(states_CH, weight_DH, torch.empty(4, 7)), rounded.float())


@pytest.mark.parametrize("top", [None, 4])
def test_the_teacher_is_made_of_what_states_are_there(top):
    """Final states come in the target's dtype, and the lm_head may be kept in another."""
    target, ids_D = PackedTarget(tiny_target(), (0, 2, 3)), torch.tensor([2, 3, 5, 7, 11])
    states = target.states(torch.arange(24), LENGTHS, top)
    rows_DH, place_C = target.lm_head_VH[ids_D].double(), torch.tensor([4, 9])
    found = teacher_of(states, rows_DH, ids_D, VOCAB)(place_C, torch.empty(2, 5))
    if top is None:
        torch.testing.assert_close(found, (states.final_SH[place_C].double() @ rows_DH.T).float())
        return
    for place, row in zip(place_C.tolist(), found.tolist(), strict=True):
        best = dict(zip(states.top_ids_SM[place].tolist(), states.top_logits_SM[place].tolist(), strict=True))
        assert row == pytest.approx([best.get(token, ABSENT) for token in ids_D.tolist()])


def test_survival_weighs_the_first_step_in_full_and_later_ones_less():
    alone = {name: run(coefficient=(1.0, 0.0, 0.0), name=name)[0] for name in ("forward_kl", "survival")}
    torch.testing.assert_close(alone["survival"], alone["forward_kl"])
    later = {name: run(coefficient=(0.0, 1.0, 1.0), name=name)[0] for name in ("forward_kl", "survival")}
    assert 0 < later["survival"] < 0.9 * later["forward_kl"]


def test_prompts_and_documents_ends_never_contribute():
    """Teachers, outputs and choices outside the answer may be anything."""
    head = tiny_head()
    torch.manual_seed(6)
    outputs = [torch.randn(len(LAYOUT.columns_C), 16) for _ in range(3)]
    final_SH, choice_S = torch.randn(24, 16), torch.randint(VOCAB, (24,))
    teacher_DH = torch.randn(len(head.target_ids), 16)

    def total():
        taught = taught_positions(LAYOUT, choice_S, head.t2d, 3)
        return distillation_loss(head, outputs, final_state_teacher(final_SH, teacher_DH), taught, torch.ones(3))[0]

    before = total()
    # Document 0 drafts in columns 2, 3, 4: step 1 of column 4 and step 2 of 3 and 4 reach beyond its answer.
    outputs[1][2] = outputs[2][1] = outputs[2][2] = 1e3
    final_SH[:3], final_SH[6:9] = 1e3, 1e3
    choice_S[:3], choice_S[6:9] = 1, 1
    torch.testing.assert_close(total(), before)
    outputs[1][1] = 1e3
    assert not torch.isclose(total(), before)


def test_acceptance_by_hand():
    """Two kept tokens and a head whose choices are written into its output."""
    head = tiny_head([3, 5])
    with torch.no_grad():
        head.norm.weight.fill_(1)
        head.lm_head.weight.zero_()
        head.lm_head.weight[0, 0] = head.lm_head.weight[1, 1] = 1

    def says(rows):  # 0 proposes token 3, 1 proposes token 5
        return torch.nn.functional.one_hot(torch.tensor(rows), 16).float()

    # One row: prompt 0, answer 1..4. Teachers j = 1, 2, 3 choose 3, 5, 9 (out of vocabulary).
    layout = make_layout([5], torch.tensor([0, 1, 1, 1, 1], dtype=torch.bool))
    choice_S = torch.tensor([0, 3, 5, 9, 0])
    # Step 0 at t = 0, 1, 2 proposes 3 (match), 3 (miss), 3 (no match possible).
    # Step 1 at t = 0, 1 proposes 5 (match, and chained to the match before), 5 (no match possible).
    outputs = [says([0, 0, 0]), says([1, 1, 0])]
    taught = taught_positions(layout, choice_S, head.t2d, 2)
    _, sums = distillation_loss(
        head, outputs, final_state_teacher(torch.zeros(5, 16), torch.zeros(2, 16)), taught, torch.ones(2)
    )
    assert sums.started_K.tolist() == [3, 2]
    assert sums.trained_K.tolist() == [2, 1]
    # An even teacher, and logits of 4 and 0: the norm makes 4 of a single 1 in 16.
    divergence = math.log(math.exp(4) + 1) - 2 - math.log(2)
    assert sums.loss_K.tolist() == pytest.approx([2 * divergence, divergence], rel=1e-3)
    assert sums.matched_K.tolist() == [1, 1]
    assert sums.chained_K.tolist() == [1, 1]
    assert sums.reached_K.tolist() == [3, 1]
    metrics = sums.metrics()
    assert metrics.acceptance == pytest.approx([1 / 3, 1 / 2])
    assert metrics.conditional_acceptance == pytest.approx([1 / 3, 1])
    assert metrics.acceptance_length == pytest.approx(1 + 1 / 3 + 1 / 2)


def test_a_chain_breaks_at_its_first_miss():
    head = tiny_head([3, 5])
    with torch.no_grad():
        head.lm_head.weight.zero_()
        head.lm_head.weight[0, 0] = head.lm_head.weight[1, 1] = 1
    layout = make_layout([5], torch.tensor([0, 1, 1, 1, 1], dtype=torch.bool))
    choice_S = torch.tensor([0, 3, 3, 3, 0])
    wrong, right = torch.eye(16)[1].expand(3, 16), torch.eye(16)[0].expand(3, 16)
    taught = taught_positions(layout, choice_S, head.t2d, 2)
    arguments = (final_state_teacher(torch.zeros(5, 16), torch.zeros(2, 16)), taught, torch.ones(2))
    _, sums = distillation_loss(head, [wrong, right], *arguments)
    assert sums.matched_K.tolist() == [0, 2]
    assert sums.chained_K.tolist() == [0, 0]
    _, sums = distillation_loss(head, [right, wrong], *arguments)
    assert (sums.matched_K.tolist(), sums.chained_K.tolist()) == ([3, 0], [3, 0])
    _, sums = distillation_loss(head, [right, right], *arguments)
    assert (sums.chained_K.tolist(), sums.reached_K.tolist()) == ([3, 2], [3, 2]), "none goes on from another's end"


def test_sums_add_up_over_batches():
    whole = run()[1].stack()
    document_S = LAYOUT.document_S
    parts = [run(ANSWER_S & (document_S == document))[1].stack() for document in range(3)]
    torch.testing.assert_close(sum(parts), whole, atol=1e-5, rtol=1e-5)
    assert StepSums.unstack(whole).metrics().acceptance_length >= 1


@pytest.mark.parametrize("top", [None, 4])
@pytest.mark.parametrize("name", LOSSES)
@fx_config.patch(meta_nonzero_assume_all_nonzero=True)
def test_the_loss_makes_no_tensor_on_another_device(name, top):
    """Shown on the device without memory, which refuses what lies on the CPU, as a GPU does."""
    meta = torch.device("meta")
    head, layout = tiny_head().to(meta), LAYOUT.to(meta)
    taught = taught_positions(layout, torch.zeros(24, dtype=torch.long, device=meta), head.t2d, 2)
    if top is None:
        teacher = final_state_teacher(torch.zeros(24, 16, device=meta), head.lm_head.weight)
    else:
        ids_SM = torch.zeros(24, top, dtype=torch.long, device=meta)
        teacher = top_logits_teacher(ids_SM, ids_SM.float(), head.target_ids, VOCAB)
    outputs = [torch.zeros(len(LAYOUT.columns_C), 16, device=meta) for _ in range(2)]
    loss, sums = distillation_loss(head, outputs, teacher, taught, torch.ones(2, device=meta), name)
    loss.backward()
    assert head.lm_head.weight.grad.is_meta
    assert sums.stack().is_meta


@pytest.mark.parametrize("name", [one for one in LOSSES if one != "total_variation"])  # whose gradient jumps
def test_a_head_that_is_bf16_itself_learns_nearly_the_same(monkeypatch, name):
    """As DeepSpeed trains it; the products are bf16, and what is summed over chunks is not."""
    monkeypatch.setattr(loss_module, "CHUNK", 4)
    generator = torch.Generator().manual_seed(6)
    outputs = [torch.randn(len(LAYOUT.columns_C), 16, generator=generator) for _ in range(2)]
    final_SH, choice_S = torch.randn(24, 16, generator=generator), torch.randint(VOCAB, (24,), generator=generator)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        head = tiny_head().to(dtype)
        teacher = final_state_teacher(final_SH, torch.eye(16))
        taught = taught_positions(LAYOUT, choice_S, head.t2d, 2)
        loss, sums = distillation_loss(head, [one.to(dtype) for one in outputs], teacher, taught, torch.ones(2), name)
        loss.backward()
        assert (loss.dtype, sums.loss_K.dtype) == (torch.float32, torch.float32)
        assert all(one.grad is None or one.grad.dtype == dtype for one in head.parameters())
        gradients.append([one.grad.float() for one in head.parameters() if one.grad is not None])
    assert len(gradients[0]) == 2, "of the norm and the lm_head"
    for plain, rough in zip(*gradients, strict=True):
        assert (rough - plain).norm() < 0.03 * plain.norm()

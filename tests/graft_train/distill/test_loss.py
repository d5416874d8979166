"""Masks, shifts and denominators on hand-made samples, and the chunked loss against the plain one."""

import pytest
import torch

from graft_train.data.states import TappedTarget
from graft_train.distill import loss as loss_module
from graft_train.distill.loss import StepSums, distillation_loss, reference_loss, taught_positions
from graft_train.distill.unroll import unroll

from .pair import VOCAB, tiny_head, tiny_target

# Row 0: prompt 0..2, answer 3..6, padding 7. Row 1: prompt 0, answer 1..7.
ANSWER_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)


def drafts(taught, rows_length=8):
    """{(row, t, step)} of everything that counts."""
    found = set()
    for place, step in taught.started_NK.nonzero().tolist():
        row, j = divmod(taught.index_N[place].item(), rows_length)
        found.add((row, j - 1 - step, step))
    return found


def test_mask_is_shifted_with_the_targets():
    taught = taught_positions(ANSWER_BS, torch.zeros(2, 8, dtype=torch.long), None, steps=3)
    m = ANSWER_BS.int()
    expected = {
        (row, t, k)
        for row in range(2)
        for k in range(3)
        for t in range(8)
        if t + 2 + k < 8 and m[row, t + 1] * m[row, t + 2 + k]
    }
    assert drafts(taught) == expected
    # The server's first draft, right before the answer, is taught; drafts that start in the prompt are not.
    assert {t for row, t, k in expected if row == 0} == {2, 3, 4}
    assert (0, 2, 2) in drafts(taught)  # token 3 -> 6, the end of the answer
    assert (0, 3, 2) not in drafts(taught)  # 7 is padding


def test_without_a_prompt_no_draft_starts_before_the_row():
    taught = taught_positions(torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.long), None, 2)
    assert drafts(taught, 4) == {(0, 0, 0), (0, 1, 0), (0, 0, 1)}


@pytest.mark.parametrize("skip", [True, False])
def test_out_of_vocabulary_choices_leave_the_loss_but_not_the_metrics(skip):
    kept_V = torch.tensor([True, True, False])
    choice_BS = torch.zeros(2, 8, dtype=torch.long)
    choice_BS[0, 4] = 2  # position j=4 of row 0 is the teacher of steps 0 and 1
    taught = taught_positions(ANSWER_BS, choice_BS, kept_V, steps=2, skip_out_of_vocabulary=skip)
    lost = taught.started_NK & ~taught.trained_NK
    assert taught.started_NK.sum(0).tolist() == [3 + 6, 2 + 5]
    assert lost.sum(0).tolist() == ([1, 1] if skip else [0, 0])
    assert taught.index_N[lost.any(1)].tolist() == ([4] if skip else [])


def test_empty_mask_gives_zero_and_no_nan():
    loss, sums, _ = run(torch.zeros(2, 8, dtype=torch.bool))
    assert loss.item() == 0
    assert sums.metrics().tau == 1
    assert sums.metrics().loss == [0, 0, 0]


def run(answer_BS, first=0, kept=None, skip=True, coefficient=(1.0, 0.4, 0.1)):
    """The loss, its sums, and gradients of all head parameters."""
    target, head = TappedTarget(tiny_target(), (0, 2, 3)), tiny_head(kept)
    tokens_BS = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(4))
    states = target.states(tokens_BS)
    taught = taught_positions(answer_BS, states.choice_BS, getattr(head, "t2d", None), 3, skip)
    outputs = unroll(head, target.embed(tokens_BS), states.taps_BSE, 3, first)
    loss, sums = distillation_loss(
        head, outputs, states.final_BSH, target.lm_head_VH[head.target_ids], taught, torch.tensor(coefficient)
    )
    loss.backward()
    return loss, sums, {name: p.grad for name, p in head.named_parameters()}


def run_reference(answer_BS, kept=None, skip=True, coefficient=(1.0, 0.4, 0.1)):
    model = tiny_target()
    target, head = TappedTarget(model, (0, 2, 3)), tiny_head(kept)
    tokens_BS = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(4))
    outputs = unroll(head, target.embed(tokens_BS), target.states(tokens_BS).taps_BSE, 3)
    loss = reference_loss(head, outputs, model(tokens_BS).logits, answer_BS, list(coefficient), skip)
    loss.backward()
    return loss, {name: p.grad for name, p in head.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 4, 512])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kept", [None, list(range(VOCAB))])
def test_chunked_loss_is_the_plain_one_with_its_gradients(monkeypatch, chunk, skip, kept):
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    loss, _, gradients = run(ANSWER_BS, kept=kept, skip=skip)
    expected, expected_gradients = run_reference(ANSWER_BS, kept, skip)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_prompt_columns_may_be_left_out():
    # The first draft of these rows starts at t = 0, of row 0 alone at t = 2.
    loss, sums, _ = run(ANSWER_BS & torch.tensor([[True], [False]]), first=2)
    whole, whole_sums, _ = run(ANSWER_BS & torch.tensor([[True], [False]]))
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(sums.stack(), whole_sums.stack())


def test_prompts_and_padding_never_contribute():
    """Teachers, outputs and choices outside the answer may be anything."""
    head = tiny_head()
    torch.manual_seed(6)
    outputs = [torch.randn(2, 8, 16) for _ in range(3)]
    final_BSH, choice_BS = torch.randn(2, 8, 16), torch.randint(VOCAB, (2, 8))
    teacher_DH = torch.randn(len(head.target_ids), 16)

    def total():
        taught = taught_positions(ANSWER_BS, choice_BS, head.t2d, 3)
        return distillation_loss(head, outputs, final_BSH, teacher_DH, taught, torch.ones(3))[0]

    before = total()
    for step, output in enumerate(outputs):
        output[0, :2] = 1e3  # starts in the prompt
        output[0, 5 - step :] = 1e3  # reaches beyond the answer
    final_BSH[0, :3], final_BSH[0, 6:] = 1e3, 1e3
    choice_BS[0, :3], choice_BS[0, 6:] = 1, 1
    torch.testing.assert_close(total(), before)


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
    answer_BS = torch.tensor([[0, 1, 1, 1, 1]], dtype=torch.bool)
    choice_BS = torch.tensor([[0, 3, 5, 9, 0]])
    # Step 0 at t = 0, 1, 2 proposes 3 (match), 3 (miss), 3 (no match possible).
    # Step 1 at t = 0, 1 proposes 5 (match, and chained to the match before), 5 (no match possible).
    outputs = [says([[0, 0, 0, 0, 0]]), says([[1, 1, 0, 0, 0]])]
    taught = taught_positions(answer_BS, choice_BS, head.t2d, 2)
    _, sums = distillation_loss(head, outputs, torch.zeros(1, 5, 16), torch.zeros(2, 16), taught, torch.ones(2))
    assert sums.started_K.tolist() == [3, 2]
    assert sums.trained_K.tolist() == [2, 1]
    assert sums.matched_K.tolist() == [1, 1]
    assert sums.chained_K.tolist() == [1, 1]
    metrics = sums.metrics()
    assert metrics.acceptance == pytest.approx([1 / 3, 1 / 2])
    assert metrics.tau == pytest.approx(1 + 1 / 3 + 1 / 2)


def test_a_chain_breaks_at_its_first_miss():
    head = tiny_head([3, 5])
    with torch.no_grad():
        head.lm_head.weight.zero_()
        head.lm_head.weight[0, 0] = head.lm_head.weight[1, 1] = 1
    answer_BS = torch.tensor([[0, 1, 1, 1, 1]], dtype=torch.bool)
    choice_BS = torch.tensor([[0, 3, 3, 3, 0]])
    wrong, right = torch.eye(16)[1].expand(1, 5, 16), torch.eye(16)[0].expand(1, 5, 16)
    taught = taught_positions(answer_BS, choice_BS, head.t2d, 2)
    arguments = (torch.zeros(1, 5, 16), torch.zeros(2, 16), taught, torch.ones(2))
    _, sums = distillation_loss(head, [wrong, right], *arguments)
    assert sums.matched_K.tolist() == [0, 2]
    assert sums.chained_K.tolist() == [0, 0]


def test_sums_add_up_over_batches():
    both = run(ANSWER_BS)[1].stack()
    rows = [run(ANSWER_BS & torch.tensor([[row == 0], [row == 1]]))[1].stack() for row in range(2)]
    torch.testing.assert_close(rows[0] + rows[1], both, atol=1e-5, rtol=1e-5)
    assert StepSums.unstack(both).metrics().tau >= 1

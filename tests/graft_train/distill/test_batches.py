import pytest
import torch

from graft_inference import GraftError
from graft_train.data.samples import Sample, answered
from graft_train.data.states import TappedTarget
from graft_train.distill.batches import cached_states, collate, online_states, plan_batches, to_rows

from .pair import VOCAB, samples, tiny_target

ROWS = to_rows(samples(), 64, VOCAB)


def test_every_epoch_has_every_row_once_within_the_budget():
    plan = plan_batches(ROWS, 30, epochs=2, seed=0)
    assert all(len(batch) * max(len(ROWS[row].tokens_S) for row in batch) <= 30 for batch in plan)
    assert sorted(row for batch in plan for row in batch) == sorted(list(range(12)) * 2)
    assert plan == plan_batches(ROWS, 30, epochs=2, seed=0)
    assert plan != plan_batches(ROWS, 30, epochs=2, seed=1)


def test_a_row_longer_than_the_budget_is_a_batch_of_its_own():
    assert sorted(plan_batches(ROWS, 1, epochs=1, seed=0)) == [[row] for row in range(12)]


def test_rows_of_unequal_length_are_padded_right_and_masked():
    batch = collate(ROWS, [0, 5], torch.device("cpu"))
    for place, sample in enumerate((samples()[0], samples()[5])):
        prompt, answer = len(sample.prompt_ids), len(sample.answer_ids)
        end = prompt + answer
        assert batch.tokens_BS[place, :end].tolist() == sample.prompt_ids + sample.answer_ids
        expected = [False] * prompt + [True] * answer + [False] * (batch.tokens_BS.shape[1] - end)
        assert batch.answer_BS[place].tolist() == expected
    assert batch.first == 1  # the shorter prompt has two tokens


def test_all_answers_of_a_conversation_are_masked_and_it_is_cut_at_a_turns_end():
    chat = Sample("chat", "train", [1, 2, 3, 4, 5, 6, 7, 8], [[2, 4], [6, 8]])
    batch = collate(to_rows([chat], 8, VOCAB), [0], torch.device("cpu"))
    assert batch.answer_BS.long().tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]]
    cut = collate(to_rows([chat], 7, VOCAB), [0], torch.device("cpu"))
    assert cut.tokens_BS.tolist() == [[1, 2, 3, 4]]
    assert cut.answer_BS.long().tolist() == [[0, 0, 1, 1]]


def test_long_answers_are_cut_and_prompts_that_leave_nothing_are_named():
    sample = answered("long", [1] * 6, samples()[0].answer_ids, {})
    assert len(to_rows([sample], 8, VOCAB)[0].tokens_S) == 8
    with pytest.raises(GraftError, match=r"sample long .*head.max_length=6"):
        to_rows([sample], 6, VOCAB)


def test_tokens_of_another_target_are_named():
    with pytest.raises(GraftError, match=f"sample s0 holds token {VOCAB}"):
        to_rows([answered("s0", [1], [VOCAB], {})], 64, VOCAB)


def test_cached_states_are_the_online_ones():
    target = TappedTarget(tiny_target(), (0, 2, 3))
    batch = collate(ROWS, [3, 8, 1], torch.device("cpu"))
    real = torch.zeros_like(batch.answer_BS)
    for place, row in enumerate(batch.rows):
        real[place, : len(ROWS[row].tokens_S)] = True
    cached, online = cached_states(target, ROWS, 40)(batch), online_states(target)(batch)
    torch.testing.assert_close(cached.taps_BSE[real], online.taps_BSE[real], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cached.final_BSH[real], online.final_BSH[real], atol=1e-5, rtol=1e-4)
    assert torch.equal(cached.choice_BS[real], online.choice_BS[real])

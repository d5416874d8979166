import pytest
import torch

from graft_inference import GraftError
from graft_train.data.samples import Sample, answered
from graft_train.distill.batches import collate, hold_out, pack, plan_batches, to_tensors, with_room
from graft_train.distill.eagle3.layout import make_layout

from .pair import VOCAB, samples

ROWS = to_tensors(samples(), 64, VOCAB)
LENGTHS = [len(row.tokens_S) for row in ROWS]


def test_every_epoch_has_every_row_once_within_the_budget():
    plan = plan_batches(LENGTHS, 30, epochs=2, seed=0)
    assert all(sum(LENGTHS[row] for row in batch) <= 30 for batch in plan)
    assert sorted(row for batch in plan for row in batch) == sorted(list(range(12)) * 2)
    assert plan == plan_batches(LENGTHS, 30, epochs=2, seed=0)
    assert plan != plan_batches(LENGTHS, 30, epochs=2, seed=1)


def test_a_document_is_held_out_or_trained_on_as_a_whole():
    rows = [Sample(f"doc{n // 3}{'#@'[n % 2]}{n}", "train", [1, 2, 3], [[1, 3]]) for n in range(30)]
    validation, training = hold_out(rows, 7, seed=0)
    assert len(validation) == 6  # two documents, as a third would be too many
    assert sorted(validation + training) == list(range(30))
    assert not {rows[row].document for row in validation} & {rows[row].document for row in training}
    assert validation != hold_out(rows, 7, seed=1)[0]
    assert hold_out(rows, 0, seed=0)[0] == []
    assert len({rows[row].document for row in hold_out(rows, 12, seed=0)[0][:4]}) > 1  # of several, in no order


def test_of_documents_larger_than_the_validation_one_gives_a_part_and_is_not_trained_on():
    rows = [Sample(f"doc{n % 2}@{n}", "train", [1, 2, 3], [[1, 3]]) for n in range(9)]
    validation, training = hold_out(rows, 3, seed=0)
    assert len(validation) == 3
    assert {rows[row].document for row in validation} == {"doc1"}  # of four rows, the other has five
    assert [rows[row].document for row in training] == ["doc0"] * 5
    validation, training = hold_out(rows[::2], 3, seed=0)
    assert (sorted(validation), training) == ([0, 1, 2], [3, 4])


def test_gaps_are_filled_by_later_rows_that_fit():
    assert pack([6, 6, 4, 3, 1], [0, 1, 2, 3, 4], 10) == [[0, 2], [1, 3, 4]]


def test_a_row_longer_than_the_budget_is_a_batch_of_its_own():
    assert sorted(plan_batches(LENGTHS, 1, epochs=1, seed=0)) == [[row] for row in range(12)]


def test_rows_lie_side_by_side_without_padding():
    batch = collate(ROWS, [0, 5], torch.device("cpu"))
    first, second = samples()[0], samples()[5]
    parts = (first.prompt_ids, first.answer_ids, second.prompt_ids, second.answer_ids)
    assert batch.tokens_S.tolist() == [token for part in parts for token in part]
    assert batch.lengths == [LENGTHS[0], LENGTHS[5]]
    layout = make_layout(batch.lengths, batch.loss_mask_S)
    assert batch.loss_mask_S.sum() == len(first.answer_ids) + len(second.answer_ids)
    begins = [len(first.prompt_ids) - 1, LENGTHS[0] + len(second.prompt_ids) - 1]
    assert layout.columns_C[layout.depth_C == 0].tolist() == begins


def test_all_answers_of_a_conversation_are_masked_and_it_is_cut_at_a_turns_end():
    chat = Sample("chat", "train", [1, 2, 3, 4, 5, 6, 7, 8], [[2, 4], [6, 8]])
    assert to_tensors([chat], 8, VOCAB)[0].loss_mask_S.long().tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    cut = to_tensors([chat], 7, VOCAB)[0]
    assert cut.tokens_S.tolist() == [1, 2, 3, 4]
    assert cut.loss_mask_S.long().tolist() == [0, 0, 1, 1]


def test_long_answers_are_cut_and_prompts_that_leave_nothing_are_left_out(capsys):
    sample = answered("long", [1] * 6, samples()[0].answer_ids, {})
    row = to_tensors([sample], 8, VOCAB)[0]
    assert row.loss_mask_S.tolist() == [False] * 6 + [True] * 2
    assert with_room([sample, samples()[0]], 6) == samples()[:1]
    assert "the prompts of 1 of 2 samples fill head.max_length=6" in capsys.readouterr().out
    with pytest.raises(GraftError, match=r"all 1 samples fill head.max_length=6, the shortest with 6 tokens"):
        with_room([sample], 6)


def test_answers_of_one_token_are_counted_and_alone_they_are_refused(capsys):
    mute = [answered(f"m{n}", [1, 2], [3], {}) for n in range(2)]
    assert len(to_tensors([*mute, samples()[0]], 64, VOCAB)) == 3
    assert "2 of 3 samples have answers of one token" in capsys.readouterr().out
    with pytest.raises(GraftError, match=r"none of 2 samples has an answer of two tokens.*max_new_tokens"):
        to_tensors(mute, 64, VOCAB)


def test_tokens_of_another_target_are_named():
    with pytest.raises(GraftError, match=f"sample s0 holds token {VOCAB}"):
        to_tensors([answered("s0", [1], [VOCAB], {})], 64, VOCAB)

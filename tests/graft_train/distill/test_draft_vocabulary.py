from graft_train.data.samples import answered
from graft_train.distill.draft_vocabulary import choose_draft_vocabulary

SAMPLE = answered("a", [7, 7, 7, 7, 7], [5, 5, 2, 2, 2, 9], {})


def test_answers_alone_are_counted_and_ids_ascend():
    vocabulary = choose_draft_vocabulary([SAMPLE, answered("b", [7], [9, 9], {})], 10, 2)
    assert vocabulary.token_ids_D.tolist() == [2, 9]
    assert vocabulary.coverage == 6 / 8


def test_ties_go_to_the_lower_id():
    assert choose_draft_vocabulary([SAMPLE], 10, 5).token_ids_D.tolist() == [0, 1, 2, 5, 9]


def test_a_small_vocabulary_is_taken_whole():
    vocabulary = choose_draft_vocabulary([SAMPLE], 10, 32000)
    assert vocabulary.token_ids_D.tolist() == list(range(10))
    assert vocabulary.coverage == 1

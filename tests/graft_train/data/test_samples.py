import json

import pytest

from graft_inference.errors import GraftError
from graft_train.data.samples import Sample, answered, append_samples, check_room, read_samples, to_line

TRAIN = answered("a", [1, 2], [3], {"temperature": 0.8, "seed": 7})
HELD_OUT = Sample("b", "evaluation", [4])
CHAT = Sample("c", "train", list(range(10)), [[2, 4], [6, 7], [8, 10]])


def test_what_is_appended_is_read_back_by_split(tmp_path):
    path = tmp_path / "samples.jsonl"
    for sample in (TRAIN, HELD_OUT, CHAT):
        with path.open("ab") as file:
            append_samples(file, [sample])
    assert read_samples(path, "train") == [TRAIN, CHAT]
    assert read_samples(path, "evaluation") == [HELD_OUT]
    with pytest.raises(GraftError, match="calibration split"):
        read_samples(path, "calibration")


def test_answers_and_the_rest():
    assert (TRAIN.prompt_ids, TRAIN.answer_ids) == ([1, 2], [3])
    assert (CHAT.prompt_ids, CHAT.answer_ids) == ([0, 1], [2, 3, 6, 8, 9])
    assert CHAT.loss_mask_S.long().tolist() == [0, 0, 1, 1, 0, 0, 1, 0, 1, 1]
    assert (HELD_OUT.prompt_ids, HELD_OUT.answer_ids) == ([4], [])


@pytest.mark.parametrize(
    ("length", "ids", "answers"),
    [
        (12, 10, [[2, 4], [6, 7], [8, 10]]),
        (10, 10, [[2, 4], [6, 7], [8, 10]]),
        (9, 7, [[2, 4], [6, 7]]),
        (7, 7, [[2, 4], [6, 7]]),
        (6, 4, [[2, 4]]),
        (3, 3, [[2, 3]]),  # not even the first answer fits: it loses its end
    ],
)
def test_cut_at_the_end_of_a_turn(length, ids, answers):
    assert CHAT.cut(length) == Sample("c", "train", list(range(ids)), answers)


def test_cut_to_less_than_the_prompt_leaves_nothing():
    assert CHAT.cut(2) is None
    assert HELD_OUT.cut(0) is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"answers": []}, "line 2: sample a has no answer"),
        ({"ids": [], "answers": []}, "line 2: the prompt of sample a"),
        ({"answers": [[0, 3]]}, "line 2: the prompt of sample a"),
        ({"ids": [1, 2, "x"]}, "line 2: .*list of token ids"),
        ({"answers": [[2, 4]]}, "line 2: answers of a must be .* within its 3 tokens"),
        ({"answers": [[2, 2]]}, "line 2: answers of a"),
        ({"answers": [[1, 2], [2, 3]]}, "line 2: answers of a"),  # they touch: one answer
        ({"split": "trian"}, "line 2: .*split one of"),
        ({"extra": 1}, "line 2 is not a sample"),
    ],
)
def test_bad_lines_are_named(tmp_path, change, complaint):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(json.loads(to_line(TRAIN)) | part) + "\n" for part in ({}, change)))
    with pytest.raises(GraftError, match=complaint):
        read_samples(path, "train")


def test_torn_missing_and_empty_files(tmp_path):
    path = tmp_path / "samples.jsonl"
    with pytest.raises(GraftError, match=r"run graft regenerate"):
        read_samples(path, "train")
    path.touch()
    with pytest.raises(GraftError, match="is empty"):
        read_samples(path, "train")
    path.write_bytes(to_line(TRAIN)[:-5])
    with pytest.raises(GraftError, match="line 1 is not a JSON object"):
        read_samples(path, "train")
    for line in (b"[" * 100_000, b'{"id": "\xff"}', b'{"id": NaN}', b'{"id": 1, "id": 2}'):
        path.write_bytes(line + b"\n")
        with pytest.raises(GraftError, match="line 1 is not a JSON object"):
            read_samples(path, "train")


def test_new_tokens_must_fit_behind_the_longest_prompt():
    samples = [Sample("short", "evaluation", [1]), Sample("long", "evaluation", [1, 2, 3, 4])]
    check_room(samples, 6, 10, "a.b")
    with pytest.raises(GraftError, match=r"a\.b=7 after the 4 tokens of prompt long exceeds the target's 10 positions"):
        check_room(samples, 7, 10, "a.b")

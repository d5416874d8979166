import json

import pytest

from graft_inference.errors import GraftError
from graft_train.data.samples import Sample, append_samples, read_samples

TRAIN = Sample("a", "train", [1, 2], [3], 0.8, 7)
HELD_OUT = Sample("b", "evaluation", [4], [], 0.0, 0)


def test_what_is_appended_is_read_back_by_split(tmp_path):
    path = tmp_path / "samples.jsonl"
    for sample in (TRAIN, HELD_OUT):
        with path.open("ab") as file:
            append_samples(file, [sample])
    assert read_samples(path, "train") == [TRAIN]
    assert read_samples(path, "evaluation") == [HELD_OUT]
    with pytest.raises(GraftError, match="calibration split"):
        read_samples(path, "calibration")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"answer_ids": []}, "line 2: sample a has no answer"),
        ({"prompt_ids": []}, "line 2: the prompt of sample a"),
        ({"answer_ids": [1, "x"]}, "line 2: .*lists of token ids"),
        ({"split": "trian"}, "line 2: .*split one of"),
        ({"extra": 1}, "line 2 is not a sample"),
    ],
)
def test_bad_lines_are_named(tmp_path, change, complaint):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(vars(TRAIN) | part) + "\n" for part in ({}, change)))
    with pytest.raises(GraftError, match=complaint):
        read_samples(path, "train")


def test_torn_missing_and_empty_files(tmp_path):
    path = tmp_path / "samples.jsonl"
    with pytest.raises(GraftError, match=r"run recipes/regenerate\.py"):
        read_samples(path, "train")
    path.touch()
    with pytest.raises(GraftError, match="is empty"):
        read_samples(path, "train")
    path.write_text(json.dumps(vars(TRAIN))[:-5])
    with pytest.raises(GraftError, match="line 1 is not a JSON object"):
        read_samples(path, "train")

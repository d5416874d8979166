"""A suite's questions, in its own fields and in EAGLE's layout."""

import json

import pytest

from graft_inference import GraftError
from graft_train.config.data import DataConfig
from graft_train.config.evaluation import SUITES
from graft_train.data import sources
from graft_train.data.bad_records import BadRecord
from graft_train.data.suites import MASKED, read_questions, to_question

OWN = {
    "mt_bench": {"prompt": ["a", "b"], "prompt_id": 81, "category": "writing", "reference": []},
    "humaneval": {"task_id": "HumanEval/3", "prompt": "def f():", "canonical_solution": "x", "test": "y"},
    "gsm8k": {"question": "a", "answer": "#### 1"},
    "alpaca": {"instruction": "a", "input": "b", "output": "c", "text": "d"},
    "sum": {"article": "a", "highlights": "b", "id": "c0"},
    "qa": {"question": "a", "answer": ["b"]},
    "speed_bench": {
        "question_id": "f3",
        "category": "rag",
        "turns": ["a", "b"],
        "multiturn": True,
        "sub_category": "x",
        "source": "y",
        "src_id": "z",
        "difficulty": "hard",
    },
}
READ = {
    "mt_bench": ("81", "writing", ("a", "b")),
    "humaneval": ("HumanEval/3", "code", ("def f():",)),
    "gsm8k": ("7", "math", ("a",)),
    "alpaca": ("7", "instructions", ("a\n\nb",)),
    "sum": ("c0", "summarization", ("Summarize: a",)),
    "qa": ("7", "qa", ("a",)),
    "speed_bench": ("f3", "rag", ("a", "b")),
}
EAGLE = {"question_id": 0, "category": "coding", "turns": ["a", "b"], "reference": ["c"]}


def write(path, rows) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path))


@pytest.mark.parametrize("name", OWN)
def test_a_sets_own_fields_are_read(name):
    question = to_question(name, OWN[name], "row 7", 7)
    assert (question.id, question.category, question.turns) == READ[name]


@pytest.mark.parametrize("name", SUITES)
def test_eagles_layout_is_read_for_every_suite(name):
    question = to_question(name, EAGLE, "row 7", 7)
    assert (question.id, question.category, question.turns) == ("0", "coding", ("a", "b"))


def test_a_table_may_have_made_floats_of_ids():
    assert to_question("spec_bench", EAGLE | {"question_id": 81.0, "category": 2.0}, "row", 7).id == "81"


@pytest.mark.parametrize("empty", ["", None])
def test_an_instruction_without_an_input_stands_alone(empty):
    assert to_question("alpaca", OWN["alpaca"] | {"input": empty}, "row", 1).turns == ("a",)


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        (
            "mt_bench",
            {"text": "a"},
            r"row 3 is no question .*turns, or .*prompt_id, prompt; .* \['text'\]",
        ),
        ("spec_bench", {"prompt": "a"}, r"needs EAGLE's fields question_id, category and turns; it has \['prompt'\]"),
        ("gsm8k", OWN["humaneval"], "is no question of gsm8k"),
        ("mt_bench", {"prompt": ["a"], "prompt_id": 1}, "is no question of mt_bench"),
        ("gsm8k", ["a"], "is no question of gsm8k"),
        ("gsm8k", {"question": ""}, "is no question of gsm8k"),
        ("gsm8k", {"question": 5}, "the field question must be"),
        ("qa", {"question": "a", "context": "b"}, "the field context may be a part of the prompt"),
        ("gsm8k", {"question": "a", "passage": "b"}, "the field passage may be a part of the prompt"),
        ("humaneval", OWN["humaneval"] | {"image_path": "b"}, "the field image_path may be a part of the prompt"),
        ("gsm8k", {"question": "a", "text": "b"}, "the field text may be a part of the prompt"),
        ("humaneval", OWN["humaneval"] | {"prompt": '[{"role": "user"}]'}, "the field prompt holds a conversation as"),
        ("spec_bench", EAGLE | {"category": ["a"]}, "is no question of spec_bench"),
        ("spec_bench", EAGLE | {"category": {"a": "b"}}, "is no question of spec_bench"),
        ("spec_bench", EAGLE | {"system_prompt": "b"}, "the field system_prompt would change the prompt"),
        ("spec_bench", EAGLE | {"turns": "a"}, "the field turns must be"),
        ("spec_bench", EAGLE | {"turns": ["a", " "]}, "the field turns must be"),
        ("spec_bench", EAGLE | {"turns": [{"role": "user", "content": "a"}]}, "the field turns must be"),
        ("speed_bench", EAGLE | {"turns": ["a", f"{MASKED} FROM"]}, "a note in place of this question; .* its card"),
    ],
)
def test_what_is_no_question_is_named(name, row, words):
    with pytest.raises(BadRecord, match=words):
        to_question(name, row, "row 3", 3)


def test_the_categories_come_in_turns_in_an_order_of_the_seed(tmp_path):
    rows = [EAGLE | {"question_id": place, "category": "abc"[place % 7 % 3]} for place in range(21)]
    data = write(tmp_path / "question.jsonl", rows)
    found = read_questions("spec_bench", data, 0)
    assert {question.category for question in found[:3]} == set("abc")
    assert [question.category for question in found[:9]].count("a") == 3
    assert sorted(int(question.id) for question in found) == list(range(21))
    assert found == read_questions("spec_bench", data, 0) != read_questions("spec_bench", data, 1)


def test_a_bad_record_stops_or_is_left_out_as_everywhere(tmp_path, capsys):
    data = write(tmp_path / "question.jsonl", [EAGLE, {"text": "a"}, EAGLE, EAGLE | {"question_id": 1}])
    with pytest.raises(GraftError, match=r"question.jsonl, line 2 is no question .*on_error=skip leaves such"):
        read_questions("spec_bench", data, 0)
    data.on_error = "skip"
    assert sorted(question.id for question in read_questions("spec_bench", data, 0)) == ["0", "1"]
    said = capsys.readouterr().out
    assert "left out 2 of 4 records" in said
    assert "line 3 has the id 0 of" in said
    (tmp_path / "question.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(GraftError, match="holds no question of gsm8k"):
        read_questions("gsm8k", data, 0)


def test_a_text_file_is_no_suite(tmp_path):
    (tmp_path / "notes.txt").write_text("What is it?")
    with pytest.raises(GraftError, match=r"notes.txt is no question of gsm8k"):
        read_questions("gsm8k", DataConfig(path=str(tmp_path / "notes.txt")), 0)


def test_rows_of_the_hub_are_read(monkeypatch):
    monkeypatch.setattr(sources, "load_dataset", lambda path, name, split: [OWN["gsm8k"]] * (split == "test"))
    found = read_questions("gsm8k", DataConfig(path="openai/gsm8k", hub_subset="main", hub_split="test"), 0)
    assert [(question.id, question.place) for question in found] == [("1", "data set openai/gsm8k, row 1")]

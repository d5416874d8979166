import json

import pytest

from graft_train.data.bad_records import BadRecord
from graft_train.data.records import to_content

ASKED = {"role": "user", "content": "a"}
ANSWERED = (ASKED, {"role": "assistant", "content": "b"})
BRIEF = {"role": "system", "content": "Be brief."}
SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": list(ANSWERED)},
        {"messages": [ASKED | {"tool_calls": None}, ANSWERED[1]], "tools": None},
        {"messages": [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]},
        {"messages": list(ANSWERED), "prompt": "a", "text": "rendered", "prompt_id": "f00"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": list(ANSWERED)},
        {"id": "0", "data": ["a", "b"]},
        {"question": "a", "answer": "b"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": " ", "response": "b"},
        {"prompt": [ASKED], "completion": [ANSWERED[1]]},
        {"turns": [{"from": "human", "value": "a"}], "response": "b"},
    ],
)
def test_every_shape_of_a_conversation_gives_the_same_messages(record):
    assert to_content(record, "row").messages == ANSWERED


def test_numbers_beside_a_text_say_nothing():
    assert to_content({"text": "x = 1", "turns": 3, "role": None}, "row") == "x = 1"


def test_text_and_prompt_alone():
    assert to_content({"text": "x = 1"}, "row") == "x = 1"
    assert to_content({"prompt": "a"}, "row").messages == (ASKED,)


@pytest.mark.parametrize(
    "record",
    [
        {"question": "a", "answer": 2},
        {"turns": ["a", "b"]},
        {"turns": ["a", "b"], "answer": "c"},
        {"prompt": ["a", "b"], "input": ""},
        {"prompt": [ASKED], "chosen": "b"},
        {"prompt": ["a", "b"], "prompt_id": 1, "reference": ["c", "d"], "category": "x"},
        {"prompt": "a", "canonical_solution": "b", "test": "c", "entry_point": "f", "task_id": "HumanEval/0"},
        {"question_id": 1, "category": "x", "turns": ["a"], "answer": ["b"]},
        {"question": "a", "correct_answers": ["b"], "incorrect_answers": ["c"], "source": "x"},
        {"prompt": [ASKED], "data_source": "x", "reward_model": {"style": "y"}, "extra_info": {"index": 1}},
        {"key": 1, "prompt": "a", "instruction_id_list": ["b"], "kwargs": [{"n": 1}]},
        {
            "question": "a",
            "answerKey": "B",
            "ID": "x",
            "createdAt": "y",
            "model": "m",
            "r1_solution_1": "z",
            "pages": 3,
            "hard": True,
        },
    ],
)
def test_sets_of_prompts_ask_their_first_turn(record):
    """Spec-Bench's and MT-Bench's rows: a later turn would follow on an answer that is not there."""
    assert to_content(record, "row").messages == (ASKED,)


@pytest.mark.parametrize(
    "record",
    [
        {"system": "Be brief.", "messages": list(ANSWERED)},
        {"system": "Be brief.", "messages": [BRIEF, *ANSWERED]},
        {"system_prompt": "Be brief.", "question": "a", "response": "b"},
        {"system": "", "system_message": "Be brief.", "conversations": [*ANSWERED]},
        {"system": " ", "prompt": [BRIEF, ASKED], "completion": "b"},
    ],
)
def test_what_the_system_says_beside_the_turns_comes_first(record):
    """LLaMA-Factory's and OpenOrca's rows."""
    assert to_content(record, "row").messages == (BRIEF, *ANSWERED)


def test_nulls_are_absent_at_every_depth_of_objects_and_kept_in_lists():
    """Arrow gives every object the keys of all others."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": {"b": None, "c": [None, 1]}}}}
    schema = {"type": "function", "function": {"name": "f", "parameters": {"a": {"enum": ["x", None], "b": None}}}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    content = to_content({"messages": [ASKED | {"name": None}, turn], "tools": [schema]}, "row")
    assert content.messages[0] == ASKED
    assert content.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": {"c": [None, 1]}}
    assert content.tools[0]["function"]["parameters"] == {"a": {"enum": ["x", None]}}


def test_what_templates_read_is_kept():
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    thought = {"role": "assistant", "content": "b", "reasoning_content": "because"}
    content = to_content({"messages": [ASKED, called, {"role": "tool", "content": "1"}, thought]}, "row")
    assert content.messages == (ASKED, called | {"content": ""}, {"role": "tool", "content": "1"}, thought)
    shared = {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "reasoning_content": "x"}]
    }
    assert to_content(shared, "row").messages[1]["reasoning_content"] == "x"


@pytest.mark.parametrize(
    "record",
    [
        {"tools": [SCHEMA]},
        {"tools": json.dumps([SCHEMA]), "functions": []},
        {"tools": [{"name": "f", "parameters": {}}]},
        {"tools": "", "functions": [{"name": "f", "parameters": {}}]},
        {"tools": [{"type": "function", "name": "f", "parameters": {}}]},
    ],
)
def test_tools_in_every_shape_are_schemas_as_templates_take_them(record):
    assert to_content({"messages": list(ANSWERED)} | record, "row").tools == (SCHEMA,)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (None, "row 1 is empty"),
        ([], "row 1 is not a JSON object"),
        ({"body": "b"}, r"row 1 has none of the fields messages.*\['body'\]"),
        ({"text": 3}, "row 1: the field text must be a string"),
        ({"text": " "}, "row 1 is empty"),
        ({"messages": []}, "row 1 is empty"),
        ({"messages": "hi"}, "row 1: the field messages must be a list"),
        ({"messages": [{"role": "user"}]}, "row 1: the field messages, turn 1 needs"),
        ({"messages": [ASKED, {"role": "assistant", "content": None}]}, "turn 2 needs"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "turn 1 needs"),
        ({"conversations": [{"from": "bob", "value": "x"}]}, "unknown speaker 'bob'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "row 1: .*no turn that the target could answer"),
        ({"data": ["a", 3]}, "row 1: the field data, turn 2 needs"),
        ({"prompt": ""}, "row 1: the field prompt"),
        ({"turns": []}, "row 1: the field turns"),
        ({"turns": [ASKED, "b"]}, "row 1: the field turns, turn 2 must be an object"),
        ({"prompt": [ASKED], "completion": [{"role": "assistant"}]}, "row 1: the field completion, turn 1 needs"),
        ({"messages": [ASKED], "tools": "{oops"}, "row 1: the field tools is not JSON"),
        ({"messages": [ASKED], "tools": ["f"]}, "row 1: the field tools must be a list of JSON schemas"),
        ({"messages": [ASKED], "tools": '["\\ud83d"]'}, "row 1: the field tools holds half a surrogate pair"),
        ({"messages": [ASKED], "tools": [SCHEMA], "functions": [SCHEMA]}, "row 1 has both the fields tools and functi"),
        ({"messages": [BRIEF, ASKED], "system": "Be long."}, "row 1: the field system and the first turn say differ"),
        ({"messages": [ASKED], "system": ["Be brief."]}, "row 1: of the fields system, .* as a string"),
        ({"messages": [ASKED], "system": "a", "system_prompt": "b"}, "row 1: of the fields system, .* only one"),
        ({"messages": [ASKED], "chat_template_kwargs": {"x": 1}}, r"row 1: the field chat_template.* data\.chat_templ"),
        ({"messages": [ASKED], "documents": [{"text": "t"}]}, "row 1: the field documents .*write them into the turns"),
        ({"conversations": [ASKED], "images": ["x.png"]}, "row 1: the field images .*only text is"),
        ({"question": "a", "choices": ["b", "c"]}, "row 1: the field choices .*write it into the turn"),
        *(
            ({"question": "a", name: value}, f"row 1: the field {name} may be a part of the prompt")
            for name, value in {
                "passage": "b",
                "article": "b",
                "history": [["b", "c"]],
                "context": {"title": ["b"]},
                "input": "b",
                "starter_code": "b",
                "code_context": "b",
                "endings": ["b"],
                "image_path": "b",
                "image_id": "b",
                "source_text": "b",
                "opa": "b",
                "instruction": "b",
                "reasoning": "b",
                "\u8f93\u5165": "b",
            }.items()
        ),
        ({"instruction": "a", "output": "b", "text": "c"}, "row 1 has the fields text and instruction"),
        ({"text": "a", "role": "prompter"}, "row 1 has the fields text and role"),
        ({"text": "a", "prompt": "b"}, "row 1 has the fields text and prompt"),
        ({"text": "a", "question": "b"}, "row 1 has the fields text and question"),
        ({"prompt": ["a", "b"], "completion": ["c", "d"]}, "row 1 holds lists of questions and of completion"),
        ({"question": ["a", "b"], "id": [1, 2]}, "row 1 holds lists of questions and of id"),
        ({"prompt": json.dumps([ASKED])}, "row 1: the field prompt holds turns as a string"),
        ({"question": str([{"content": "a", "role": "user"}])}, "row 1: the field question holds turns as a string"),
    ],
)
def test_bad_records_are_named(record, complaint):
    with pytest.raises(BadRecord, match=complaint):
        to_content(record, "row 1")

import pytest

from graft_train.data.bad_records import BadRecord
from graft_train.data.records import to_content

ASKED = {"role": "user", "content": "a"}
ANSWERED = (ASKED, {"role": "assistant", "content": "b"})


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
    ],
)
def test_every_shape_of_a_conversation_gives_the_same_messages(record):
    assert to_content(record, "row").messages == ANSWERED


def test_text_and_prompt_alone():
    assert to_content({"text": "x = 1"}, "row") == "x = 1"
    assert to_content({"prompt": "a"}, "row").messages == (ASKED,)


@pytest.mark.parametrize("record", [{"question": "a", "answer": "b"}, {"turns": ["a", "b"]}, {"prompt": ["a", "b"]}])
def test_sets_of_prompts_ask_their_first_turn(record):
    """GSM8K's, Spec-Bench's and MT-Bench's rows: a later turn would follow on an answer that is not there."""
    assert to_content(record, "row").messages == (ASKED,)


def test_what_templates_read_is_kept():
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    thought = {"role": "assistant", "content": "b", "reasoning_content": "because"}
    content = to_content({"messages": [ASKED, called, {"role": "tool", "content": "1"}, thought]}, "row")
    assert content.messages == (ASKED, called | {"content": ""}, {"role": "tool", "content": "1"}, thought)
    shared = {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "reasoning_content": "x"}]
    }
    assert to_content(shared, "row").messages[1]["reasoning_content"] == "x"


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_tools_as_schemas_or_as_a_string_of_them(tools):
    assert to_content({"messages": list(ANSWERED), "tools": tools}, "row").tools == ({"name": "f"},)


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
        ({"messages": [ASKED], "tools": "{oops"}, "row 1: the field tools is not JSON"),
        ({"messages": [ASKED], "tools": ["f"]}, "row 1: the field tools must be a list of JSON schemas"),
    ],
)
def test_bad_records_are_named(record, complaint):
    with pytest.raises(BadRecord, match=complaint):
        to_content(record, "row 1")

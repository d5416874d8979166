from datetime import date

import pytest

from graft_train.data.bad_records import BadRecord
from graft_train.data.turns import as_template_reads, to_message

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("human", "user"),
        ("User", "user"),
        ("gpt", "assistant"),
        ("model", "assistant"),
        ("bot", "assistant"),
        (" ASSISTANT ", "assistant"),
        ("System", "system"),
        ("developer", "developer"),
        ("observation", "tool"),
        ("function", "tool"),
        ("ipython", "tool"),
    ],
)
def test_speakers_are_known_under_role_and_under_from(speaker, role):
    said = {"role": role, "content": "x"}
    for turn in ({"role": speaker, "content": "x"}, {"from": speaker, "value": "x"}, {"from": speaker, "content": "x"}):
        assert to_message(turn, "turn 1") == said


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "gpt", "tool_calls": '[{"name": "f", "arguments": {"a": 1}}]'},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}], "function_call": {}},
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": 1}'}, "tool_calls": []},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "tool_call", "value": '[{"name": "f", "arguments": "{\\"a\\": 1}"}]'},
    ],
)
def test_every_shape_of_a_call_gives_the_same_message(turn):
    """OpenAI's today and before, Hermes's and LLaMA-Factory's."""
    assert to_message(turn, "turn 1") == CALLED


@pytest.mark.parametrize("arguments", [{}, {"arguments": ""}, {"arguments": "{}"}, {"arguments": {}}])
def test_a_call_without_arguments_has_an_empty_object(arguments):
    message = to_message({"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"} | arguments}]}, "t")
    assert message["tool_calls"] == [{"id": "1", "function": {"name": "f", "arguments": {}}}]


def test_a_call_keeps_its_id_and_what_its_string_says():
    """A string is what the model wrote, and Arrow leaves it alone: its nulls stay."""
    message = to_message(
        {"role": "assistant", "tool_calls": [{"id": "1", "name": "f", "arguments": '{"b":null}'}]}, "t"
    )
    function = {"name": "f", "arguments": {"b": None}}
    assert message["tool_calls"] == [{"type": "function", "id": "1", "function": function}]


def test_fields_under_other_names_are_those_of_templates():
    assert to_message({"role": "user", "text": "x"}, "t") == {"role": "user", "content": "x"}
    for name in ("reasoning_content", "reasoning", "thinking"):
        thought = to_message({"role": "assistant", "content": "x", name: "so"}, "t")
        assert thought == {"role": "assistant", "content": "x", "reasoning_content": "so"}
    both = {"role": "assistant", "content": "x", "reasoning": "so", "reasoning_content": "so"}
    assert to_message(both, "t") == {"role": "assistant", "content": "x", "reasoning_content": "so"}
    result = {"role": "tool", "content": "1", "tool_call_id": "c1"}
    assert to_message({"from": "tool", "value": "1", "call_id": "c1"}, "t") == result
    assert to_message(result | {"name": "f"}, "t") == result | {"name": "f"}


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (
            "{% if m.reasoning_content is string %}{{ m.reasoning_content }}{% endif %}{{ enable_thinking }}",
            "reasoning_content",
        ),
        ("{% if 'thinking' in m %}{{ m['thinking'] }}{% endif %}", "thinking"),
        ("{{ m.reasoning }}, reasoning_content", "reasoning"),
        ("no thinking and no reasoning", "reasoning_content"),
    ],
)
def test_a_thought_has_the_name_that_the_template_reads(template, name):
    thought = to_message({"role": "assistant", "content": "x", "thinking": "so"}, "t")
    assert as_template_reads(thought, template) == {"role": "assistant", "content": "x", name: "so"}


@pytest.mark.parametrize(
    ("turn", "complaint"),
    [
        ("x", "turn 3 must be an object"),
        ({"content": "x"}, "turn 3 needs the strings role and content"),
        ({"role": 1, "content": "x"}, "turn 3 needs the strings role and content"),
        ({"role": "bob", "content": "x"}, "turn 3: unknown speaker 'bob'; known are user, human"),
        ({"role": "assistant", "content": "x", "reasoning_content": ["so"]}, "turn 3 needs the strings"),
        ({"role": "user", "content": "x", "text": "y"}, "turn 3 has two different values for content.*text"),
        (
            {"role": "assistant", "content": "x", "reasoning": "a", "thinking": "b"},
            "two different values for reasoning",
        ),
        ({"role": "user", "content": "x", "images": ["a.png"]}, "turn 3: the field images"),
        ({"role": "assistant", "content": "x", "channel": "analysis"}, "turn 3: the field channel"),
        (CALLED | {"function_call": {"name": "g"}}, "turn 3 has both tool_calls and function_call"),
        (CALLED | {"tool_calls": [{"function": "f"}]}, "turn 3, tool call 1 needs a function with a name"),
        (CALLED | {"tool_calls": [CALL, {"id": "1"}]}, "turn 3, tool call 2 needs a function with a name"),
        (CALLED | {"tool_calls": [{"name": "f", "parameters": {}}]}, r"tool call 1 has no arguments.*\['parameters'\]"),
        (CALLED | {"tool_calls": [{"name": "f", "arguments": "{a: 1}"}]}, "tool call 1: its arguments is not JSON"),
        (CALLED | {"tool_calls": [{"name": "f", "arguments": '"{}"'}]}, "tool call 1: its arguments must be an object"),
        (CALLED | {"tool_calls": [{"name": "f", "arguments": '{"a": NaN}'}]}, "NaN is no number of JSON"),
        (CALLED | {"tool_calls": [{"name": "f", "arguments": '{"a": "\\ud83d"}'}]}, "half a surrogate pair"),
        (
            CALLED | {"tool_calls": [{"name": "f", "arguments": {"a": date(2024, 1, 1)}}]},
            "tool call 1 is not JSON: .*date",
        ),
        ({"from": "function_call", "value": "f(1)"}, "turn 3: its call of tools is not JSON"),
        ({"from": "function_call", "value": "3"}, "turn 3: its calls of tools must be a list"),
        ({"from": "function_call"}, "turn 3 needs the strings"),
    ],
)
def test_what_would_be_lost_or_misread_is_named(turn, complaint):
    with pytest.raises(BadRecord, match=complaint):
        to_message(turn, "turn 3")

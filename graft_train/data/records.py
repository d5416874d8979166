"""Records: the rows of a data set, in the shapes people publish, made into text or a conversation."""

import json
from dataclasses import dataclass
from typing import Any

from graft_train.data.bad_records import BadRecord

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# The order matters: sets with messages often hold them rendered as text, or their first turn as a prompt, too.
FIELDS = ("messages", "conversations", "data", "text", "prompt", "turns", "question")
ASKING = ("prompt", "turns", "question")
"""What the user asks, as sets of prompts have it."""
# Roles whose turns the target does not answer.
UNASKING = ("system", "developer", "assistant")
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """OpenAI messages ({"role", "content"}, and whatever else the chat template reads, such as
    reasoning_content or tool_calls), and the tools as JSON schemas.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None


Content = str | Conversation


def to_content(row: Any, place: str) -> Content:
    """What a record holds; the first of `FIELDS` that it has decides.

    Args:
        row: a JSON object; fields that are null count as absent, as Parquet fills them.
        place: names the record in errors.

    Raises:
        BadRecord: no known field, an empty one, or a conversation that is none or asks for no answer.
    """
    known = ", ".join(FIELDS)
    if row is None:
        raise BadRecord(f"{place} is empty")
    if not isinstance(row, dict):
        raise BadRecord(f"{place} is not a JSON object with one of the fields {known}")
    field = next((name for name in FIELDS if row.get(name) is not None), None)
    if field is None:
        raise BadRecord(f"{place} has none of the fields {known}; it has {sorted(row)}")
    value = row[field]
    if field == "text":
        if not isinstance(value, str):
            raise BadRecord(f"{place}: the field text must be a string")
        if not value.strip():
            raise BadRecord(f"{place} is empty: its text is blank")
        return value
    messages = _turns(field, value, f"{place}: the field {field}")
    if not messages:
        raise BadRecord(f"{place} is empty: its conversation has no turn")
    if all(message["role"] in UNASKING for message in messages):
        raise BadRecord(f"{place}: the conversation has no turn that the target could answer")
    return Conversation(messages, _tools(row.get("tools"), place))


def _turns(field: str, value: Any, what: str) -> tuple[Message, ...]:
    if field in ASKING:
        if isinstance(value, list):  # MT-Bench: the user's turns alone, of which the others follow on answers
            value = value[0] if value else None
        if not isinstance(value, str) or not value.strip():
            raise BadRecord(f"{what} must be a string, and not blank")
        return ({"role": "user", "content": value},)
    if not isinstance(value, list):
        raise BadRecord(f"{what} must be a list of turns")
    if field == "data":  # UltraChat's first edition: strings, the user's first
        value = [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(value)]
    return tuple(_message(turn, f"{what}, turn {number}") for number, turn in enumerate(value, start=1))


def _message(turn: Any, what: str) -> Message:
    """One of OpenAI's turns or of ShareGPT's."""
    if not isinstance(turn, dict):
        raise BadRecord(f"{what} must be an object")
    turn = {key: value for key, value in turn.items() if value is not None}
    if "from" in turn:
        speaker = turn.pop("from")
        if speaker not in SHAREGPT_ROLES:
            raise BadRecord(f"{what}: unknown speaker {speaker!r}; known are {sorted(SHAREGPT_ROLES)}")
        turn = {"role": SHAREGPT_ROLES[speaker], "content": turn.pop("value", None), **turn}
    # Only a turn that calls tools may say nothing.
    content = _plain(turn.get("content", "" if turn.get("tool_calls") else None))
    if not isinstance(turn.get("role"), str) or content is None:
        raise BadRecord(f"{what} needs the strings role and content, or from and value")
    return turn | {"content": content}


def _plain(content: Any) -> str | None:
    """A string as it is, OpenAI's list of text parts joined; None for anything else."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part.get("text") or "" for part in content)
    return content if isinstance(content, str) else None


def _tools(value: Any, place: str) -> tuple[dict[str, Any], ...] | None:
    """Schemas, or as many Parquet sets keep them, a JSON string of schemas."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRecord(f"{place}: the field tools is not JSON: {error}") from error
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRecord(f"{place}: the field tools must be a list of JSON schemas")
    return tuple(value) or None

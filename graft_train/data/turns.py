"""Turns: one of a record's, in the shapes people publish, made into an OpenAI message."""

from typing import Any

from graft_inference.chat_template import names_read
from graft_train.data.bad_records import BadRecord
from graft_train.data.strict_json import parse, plain

ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai"),
    "system": ("system",),
    "developer": ("developer",),
    "tool": ("tool", "function", "observation", "ipython", "tool_response", "function_response"),
}
ROLE_OF = {speaker: role for role, speakers in ROLES.items() for speaker in speakers}
"""What sets call who speaks, whether under role or under from; upper case or not."""
CALLING = ("function_call", "tool_call", "tool_calls")
"""Speakers whose turn is a call of tools, as JSON: the assistant's."""
ALIASES = {
    "from": "role",
    "speaker": "role",
    "value": "content",
    "text": "content",
    "reasoning": "reasoning_content",
    "thinking": "reasoning_content",
    "call_id": "tool_call_id",
    "tool_use_id": "tool_call_id",
}
"""Other names of what a chat template reads in a turn."""
THOUGHT = ("reasoning_content", "reasoning", "thinking")
"""What templates call the thought before an answer; a message has it under the first."""
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
UNREAD = (*MEDIA, "channel")
"""What would change a prompt, and has no place in a message."""
Message = dict[str, Any]


def to_message(turn: Any, what: str) -> Message:
    """One of OpenAI's turns or of ShareGPT's; what is neither role, content nor a call stays as it is.

    Args:
        turn: a JSON object without nulls.
        what: names the turn in errors.

    Raises:
        BadRecord: no such turn, an unknown speaker, a call that is none, or a field that would be lost.
    """
    if not isinstance(turn, dict):
        raise BadRecord(f"{what} must be an object")
    turn = _renamed(turn, what)
    for name in UNREAD:
        if turn.pop(name, None):
            raise BadRecord(f"{what}: the field {name} would change the prompt, and is not read; only text is")
    role, calls = _role(turn, what), _calls(turn, what)
    # Only a turn that calls tools may say nothing.
    content = _plain(turn.get("content", "" if calls else None))
    if content is None or not isinstance(turn.get("reasoning_content", ""), str):
        raise BadRecord(f"{what} needs the strings role and content, or from and value")
    return turn | {"role": role, "content": content} | ({"tool_calls": calls} if calls else {})


def function_of(entry: dict[str, Any]) -> dict[str, Any]:
    """A call or a schema as OpenAI has it today; before, and in many sets, the function stood alone."""
    if "function" in entry or "name" not in entry:
        return entry
    outside = {key: entry[key] for key in ("id", "type") if key in entry}
    return {"type": "function"} | outside | {"function": {k: v for k, v in entry.items() if k not in outside}}


def as_template_reads(message: Message, template: str) -> Message:
    """A message with its thought under the name that the chat template reads, such as gpt-oss's thinking."""
    read = names_read(template)
    name = next((name for name in THOUGHT if name in read), THOUGHT[0])
    return {name if key == THOUGHT[0] else key: value for key, value in message.items()}


def _renamed(turn: dict[str, Any], what: str) -> Message:
    renamed: Message = {}
    for key, value in turn.items():
        name = ALIASES.get(key, key)
        if renamed.setdefault(name, value) != value:
            raise BadRecord(f"{what} has two different values for {name}, one of them named {key}; remove one")
    return renamed


def _role(turn: Message, what: str) -> str:
    """Moves the calls of a turn that is one into tool_calls."""
    speaker = turn.get("role")
    if not isinstance(speaker, str):
        raise BadRecord(f"{what} needs the strings role and content, or from and value")
    known = speaker.strip().lower()
    if known in CALLING:
        turn["tool_calls"] = turn.pop("content", None)
        return "assistant"
    if known not in ROLE_OF:
        raise BadRecord(f"{what}: unknown speaker {speaker!r}; known are {', '.join([*ROLE_OF, *CALLING])}")
    return ROLE_OF[known]


def _calls(turn: Message, what: str) -> list[dict[str, Any]] | None:
    calls, legacy = turn.pop("tool_calls", None), turn.pop("function_call", None)
    if calls and legacy:
        raise BadRecord(f"{what} has both tool_calls and function_call; remove one")
    calls = calls or legacy
    if isinstance(calls, str):
        calls = parse(calls, f"{what}: its call of tools")
    if isinstance(calls, dict):
        calls = [calls]
    if calls and not isinstance(calls, list):
        raise BadRecord(f"{what}: its calls of tools must be a list")
    return [_call(call, f"{what}, tool call {number}") for number, call in enumerate(calls or [], start=1)] or None


def _call(call: Any, what: str) -> dict[str, Any]:
    """With its arguments as the object that templates print or walk through; OpenAI's API has a JSON string there."""
    call = function_of(call) if isinstance(call, dict) else {}
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecord(f"{what} needs a function with a name")
    if "arguments" not in function and function.keys() != {"name"}:
        raise BadRecord(f"{what} has no arguments, but {sorted(function.keys() - {'name'})}; rename them")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse(arguments, f"{what}: its arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise BadRecord(f"{what}: its arguments must be an object, or a JSON string of one")
    return plain(call | {"function": function | {"arguments": arguments}}, what)


def _plain(content: Any) -> str | None:
    """A string as it is, OpenAI's list of text parts joined; None for anything else."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part.get("text") or "" for part in content)
    return content if isinstance(content, str) else None

"""Records: the rows of a data set, in the shapes people publish, made into text or a conversation."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from graft_train.data.bad_records import BadRecord
from graft_train.data.strict_json import parse, plain
from graft_train.data.turns import MEDIA, Message, function_of, to_message

# The order matters: sets with messages often hold them rendered as text, or their first turn as a prompt, too.
FIELDS = ("messages", "conversations", "data", "text", "prompt", "turns", "question")
ASKING = ("prompt", "turns", "question")
"""What the user asks, as sets of prompts have it."""
ANSWERING = ("completion", "response", "answer")
"""What the assistant answers to one of `ASKING`."""
SYSTEM = ("system", "system_prompt", "system_message")
"""The system's turn, where it stands beside the others."""
UNREAD = {
    "chat_template_kwargs": "data.chat_template_kwargs sets the template's variables for all records",
    "documents": "write them into the turns",
} | dict.fromkeys(MEDIA, "only text is")
"""What would change a prompt, and what to do about it."""
BESIDE_A_QUESTION = (
    *ASKING, *ANSWERING, *SYSTEM, "tools", "functions",
    "entry_point", "test_cases", "test_imports", "dataset_name", "model_name",
)  # fmt: skip
"""Fields that may stand beside a question: those that are read, and some that say nothing of the prompt."""
TELLING = {
    "id", "uid", "uuid", "guid", "qid", "idx", "index", "key", "hash", "url", "number",
    "source", "origin", "author", "model", "generator", "version", "date", "time", "timestamp", "created", "updated",
    "license", "dataset", "subset", "split",
    "category", "categories", "subcategory", "type", "kind", "task", "domain", "subject", "topic", "cluster", "group",
    "grouping", "tag", "level", "difficulty", "hardness", "ability", "language", "lang", "locale",
    "answer", "completion", "response", "output", "solution", "reference", "target", "truth", "gold", "chosen",
    "rejected", "label", "generation", "explanation", "rationale", "highlight", "verdict", "test",
    "score", "rating", "rank", "reward", "weight", "vote",
    "meta", "metadata", "info", "annotation", "annotator", "kwargs", "config",
}  # fmt: skip
"""Last words of the names of fields that say nothing of a prompt: what a record is called, where it is from, of what
kind it is, what is expected of its answer, and how good that is. Those of a list or in the plural count as one."""
WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
# Turns that a set keeps as a string.
TURNS_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")
# Roles whose turns the target does not answer.
UNASKING = ("system", "developer", "assistant")


@dataclass(frozen=True)
class Conversation:
    """OpenAI messages ({"role", "content"}, and whatever else the chat template reads, such as
    reasoning_content or tool_calls), and the tools as JSON schemas. Arguments of calls are objects.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None


Content = str | Conversation


def to_content(row: Any, place: str) -> Content:
    """What a record holds; the first of `FIELDS` that it has decides.

    Args:
        row: a JSON object; what is null counts as absent at every depth, since Parquet fills it in.
        place: names the record in errors.

    Raises:
        BadRecord: no known field, an empty one, one that would change the prompt and is not read, or a
            conversation that is none or asks for no answer.
    """
    known = ", ".join(FIELDS)
    if row is None:
        raise BadRecord(f"{place} is empty")
    if not isinstance(row, dict):
        raise BadRecord(f"{place} is not a JSON object with one of the fields {known}")
    row = _without_nulls(row)
    field = next((name for name in FIELDS if name in row), None)
    if field is None:
        raise BadRecord(f"{place} has none of the fields {known}; it has {sorted(row)}")
    return _text(row, place) if field == "text" else _conversation(row, field, place)


def name_of(value: Any) -> str | None:
    """An id or a category as text, 1.0 as 1; None for what is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int) and str(value).strip() else None


def check_beside_a_question(row: dict[str, Any], asked: Iterable[str], place: str) -> None:
    """Raises BadRecord for a field that may be a part of what is asked, such as the passage it is about.

    Args:
        row: without nulls. Numbers say nothing, and neither do fields that `TELLING` names.
        asked: the fields that are read.
    """
    for name, value in row.items():
        if _says(value) and name not in asked and not _tells_nothing(name):
            raise BadRecord(
                f"{place}: the field {name} may be a part of the prompt, and is not read; write it into the turn, "
                "or remove it"
            )


def _says(value: Any) -> bool:
    return bool(value.strip() if isinstance(value, str) else isinstance(value, list | dict) and value)


def _tells_nothing(name: str) -> bool:
    words = [word.lower() for word in WORDS.findall(name)]
    words = [word for word in words if word not in ("list", "at")]
    last = words[-1] if words else ""
    about = last in TELLING or last.removesuffix("s") in TELLING
    return name in BESIDE_A_QUESTION or (about and not set(words) & set(MEDIA))


def _without_nulls(value: Any) -> Any:
    """Of objects; Arrow never adds to a list."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _text(row: dict[str, Any], place: str) -> str:
    value = row["text"]
    for name in (*ASKING, "instruction", "role"):
        if _says(row.get(name)):
            raise BadRecord(
                f"{place} has the fields text and {name}: text would be read as a document of its own; remove one, or "
                "write them as messages"
            )
    if not isinstance(value, str):
        raise BadRecord(f"{place}: the field text must be a string")
    if not value.strip():
        raise BadRecord(f"{place} is empty: its text is blank")
    return value


def _conversation(row: dict[str, Any], field: str, place: str) -> Conversation:
    for name, remedy in UNREAD.items():
        if row.get(name):
            raise BadRecord(f"{place}: the field {name} would change the prompt, and is not read; {remedy}")
    if field in ASKING:
        check_beside_a_question(row, (field,), place)
        _check_row(row, row[field], place)
    messages = _turns(field, row[field], f"{place}: the field {field}")
    if not messages:
        raise BadRecord(f"{place} is empty: its conversation has no turn")
    if all(message["role"] in UNASKING for message in messages):
        raise BadRecord(f"{place}: the conversation has no turn that the target could answer")
    if field in ASKING:
        messages += _answer(row, row[field], place)
    return Conversation(_system(row, messages, place) + messages, _tools(row, place))


def _turns(field: str, value: Any, what: str) -> tuple[Message, ...]:
    if field in ASKING and not _are_turns(value):
        if isinstance(value, list):  # MT-Bench: the user's turns alone, of which the others follow on answers
            value = value[0] if value else None
        if not isinstance(value, str) or not value.strip():
            raise BadRecord(f"{what} must be a string, and not blank, or a list of turns")
        if TURNS_AS_TEXT.match(value):
            raise BadRecord(f"{what} holds turns as a string; give the list itself")
        return ({"role": "user", "content": value},)
    if not isinstance(value, list):
        raise BadRecord(f"{what} must be a list of turns")
    if field == "data":  # UltraChat's first edition: strings, the user's first
        value = [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(value)]
    return tuple(to_message(turn, f"{what}, turn {number}") for number, turn in enumerate(value, start=1))


def _check_row(row: dict[str, Any], asked: Any, place: str) -> None:
    """Raises BadRecord for a table by its columns, which is no record."""
    if not isinstance(asked, list) or _are_turns(asked) or len(asked) < 2:
        return
    for name in (*ANSWERING, "id"):
        if isinstance(row.get(name), list) and len(row[name]) == len(asked):
            raise BadRecord(f"{place} holds lists of questions and of {name}, as if columns; give one record a row")


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(turn, dict) for turn in value)


def _answer(row: dict[str, Any], asked: Any, place: str) -> tuple[Message, ...]:
    """The assistant's turns behind the question; () where there are none, or labels such as numbers."""
    if isinstance(asked, list) and not _are_turns(asked) and len(asked) > 1:
        return ()  # it would follow on turns that are left out
    for field in ANSWERING:
        value = row.get(field)
        if isinstance(value, str) and value.strip():
            return ({"role": "assistant", "content": value},)
        if _are_turns(value):
            return _turns(field, value, f"{place}: the field {field}")
    return ()


def _system(row: dict[str, Any], messages: tuple[Message, ...], place: str) -> tuple[Message, ...]:
    """The system's turn that stands beside the others; () where there is none, or it is the first of them, too."""
    said = {name: row[name] for name in SYSTEM if row.get(name)}
    if not said:
        return ()
    if len(said) > 1 or not all(isinstance(text, str) for text in said.values()):
        raise BadRecord(f"{place}: of the fields {', '.join(SYSTEM)} only one may be there, and as a string")
    turn = {"role": "system", "content": next(iter(said.values()))}
    if messages[0] == turn or not turn["content"].strip():
        return ()
    if messages[0]["role"] in ("system", "developer"):
        raise BadRecord(f"{place}: the field {next(iter(said))} and the first turn say different things; remove one")
    return (turn,)


def _tools(row: dict[str, Any], place: str) -> tuple[dict[str, Any], ...] | None:
    """Schemas, or as many Parquet sets keep them, a JSON string of schemas; functions is what they were called once."""
    given = [name for name in ("tools", "functions") if row.get(name)]
    if not given:
        return None
    if len(given) > 1:
        raise BadRecord(f"{place} has both the fields tools and functions; remove one")
    what, value = f"{place}: the field {given[0]}", row[given[0]]
    if isinstance(value, str):
        value = parse(value, what) if value.strip() else []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRecord(f"{what} must be a list of JSON schemas")
    return tuple(function_of(plain(tool, what)) for tool in value) or None

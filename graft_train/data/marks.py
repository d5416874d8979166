"""Marks in a rendered conversation: where its answers stand in the text, and what its other turns say."""

import re
from dataclasses import dataclass, field

from graft_train.data.records import UNASKING, Message

# Unicode keeps these characters for a program's own use: no text has them.
ANSWER, ANSWERED, ASKING, TOLD, SAID = "\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4"
"""Before and behind a generation span; before what a turn asks, before what another turn tells, and behind both."""
MARKS = re.compile(f"([{ANSWER}-{SAID}])")
GENERATION = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
END_GENERATION = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")


@dataclass
class Rendered:
    """A conversation as text, in [start, end) of its characters.

    Attributes:
        answers: the template's generation spans.
        said: what turns say that are not the assistant's.
        asked: where the first question begins; None where the template swallows it.
    """

    text: str
    answers: list[tuple[int, int]] = field(default_factory=list)
    said: list[tuple[int, int]] = field(default_factory=list)
    asked: int | None = None


def marking(template: str) -> str:
    """The template, which now writes a mark at both ends of a generation span too.

    The marks are in the text itself: transformers counts the characters before a span, and counts wrong where a
    template collects its text in a macro or a variable first.
    """
    begun = GENERATION.sub(rf"{{%\1 generation %}}{{% print '{ANSWER}' \2%}}", template)
    return END_GENERATION.sub(rf"{{%\1 print '{ANSWERED}' %}}{{% endgeneration \2%}}", begun)


def enclosed(message: Message) -> Message:
    """A turn with marks around what it says, inside the blanks that a template may strip; an answer as it is."""
    if message["role"] == "assistant":
        return message
    mark = TOLD if message["role"] in UNASKING else ASKING
    enclosed = re.sub(r"(?s)\S(.*\S)?|\Z", rf"{mark}\g<0>{SAID}", message["content"], count=1)
    return message | {"content": enclosed}


def read_marks(marked: str) -> Rendered:
    """What a marked text says, without its marks."""
    begun, text, length, rendered = {ANSWER: 0, SAID: 0}, [], 0, Rendered("")
    for part in MARKS.split(marked):
        if part == ANSWERED:
            rendered.answers.append((begun[ANSWER], length))
        elif part == SAID:
            rendered.said.append((begun[SAID], length))
        elif part == ANSWER:
            begun[ANSWER] = length
        elif part in (ASKING, TOLD):
            begun[SAID] = length
        else:
            text.append(part)
            length += len(part)
        if part == ASKING and rendered.asked is None:
            rendered.asked = length
    rendered.text = "".join(text)
    return rendered

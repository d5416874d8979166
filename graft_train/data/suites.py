"""Suites: the question sets that speculative decoding is compared on, each by one word."""

import random
from dataclasses import dataclass
from typing import Any

from graft_inference.errors import GraftError
from graft_train.config.data import DataConfig
from graft_train.config.evaluation import SUITES, Suite
from graft_train.data.bad_records import BadRecord, BadRecords
from graft_train.data.prompts import in_proportion
from graft_train.data.records import SYSTEM, TURNS_AS_TEXT, UNREAD, check_beside_a_question, name_of
from graft_train.data.sources import rows_of

MASKED = "FULL BENCHMARK DATA SHOULD BE FETCHED"
"""What SPEED-Bench has on the Hub in place of turns that it may not pass on."""
UNREAD_HERE = (*UNREAD, *SYSTEM, "tools", "functions")
"""Fields that would change a prompt."""
RENDERED = "text"
"""Alpaca's field with what is asked and the answer once more."""


@dataclass(frozen=True)
class Question:
    """One of a suite's: all that the user says, turn by turn.

    Attributes:
        place: where it was read, for errors.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    place: str


def read_questions(name: str, data: DataConfig, seed: int) -> list[Question]:
    """A suite's questions in an order that only `seed` decides, the categories in turns.

    Raises:
        GraftError: no such path, no question in it, or, unless data.on_error=skip, a record with other fields.
    """
    bad, found, number = BadRecords.of(data), dict[str, Question](), 0
    rows = rows_of(str(data.path), data.glob, data.hub_split, data.hub_subset, None)
    for number, row in enumerate(rows, start=1):
        try:
            question = to_question(name, row.now(), row.place, number)
            if question.id in found:
                raise BadRecord(f"{row.place} has the id {question.id} of {found[question.id].place}; give it another")
            found[question.id] = question
        except BadRecord as error:
            bad.add(error)
    bad.report(f"{number} records of {data.path}")
    if not found:
        raise GraftError(f"{data.path} holds no question of {name}")
    return _mixed(list(found.values()), seed)


def to_question(name: str, row: Any, place: str, number: int) -> Question:
    """A record in EAGLE's layout (question_id, category, turns), or with the set's own fields.

    Args:
        number: its id, where it has none.

    Raises:
        BadRecord: other fields, one that would change the prompt and is not read, or nothing asked.
    """
    suite = SUITES[name]
    row = row if isinstance(row, dict) else {}
    asked, identity = (("turns",), "question_id") if row.get("turns") else (suite.asked, suite.identity)
    category = name_of(row.get("category") or suite.category)
    if not row.get(asked[0]) or category is None:
        raise BadRecord(f"{place} is no question of {name}: it needs {_layouts(suite)}; it has {sorted(row)}")
    for field in UNREAD_HERE:
        if row.get(field) and field not in asked:
            raise BadRecord(f"{place}: the field {field} would change the prompt, and is not read; leave it out")
    check_beside_a_question(row, (*asked, RENDERED) if "instruction" in asked else asked, place)
    given = name_of(row.get(identity)) if identity else None
    return Question(given or str(number), category, _turns(row, suite, asked, place), place)


def _layouts(suite: Suite) -> str:
    """The fields of a suite's records, for errors."""
    fields = filter(None, (suite.identity, *suite.asked))
    own = "" if suite.asked == ("turns",) else f", or the set's own {', '.join(fields)}"
    return f"EAGLE's fields question_id, category and turns{own}"


def _turns(row: dict[str, Any], suite: Suite, asked: tuple[str, ...], place: str) -> tuple[str, ...]:
    turns = row[asked[0]]
    if isinstance(turns, str) and asked != ("turns",):
        turns = [suite.before + "\n\n".join(str(row[field]) for field in asked if row.get(field))]
    if not isinstance(turns, list) or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise BadRecord(f"{place}: the field {asked[0]} must be the user's turns, strings that are not blank")
    if any(TURNS_AS_TEXT.match(turn) for turn in turns):
        raise BadRecord(f"{place}: the field {asked[0]} holds a conversation as a string; give what the user says")
    if any(MASKED in turn for turn in turns):
        raise BadRecord(
            f"{place}: the Hub has a note in place of this question; make the whole set by the script that its card "
            "names, and give the file as evaluation.path"
        )
    return tuple(turns)


def _mixed(questions: list[Question], seed: int) -> list[Question]:
    """Shuffled, and equally many of each category while it lasts."""
    random.Random(seed).shuffle(questions)
    by_category: dict[str, list[Question]] = {}
    for question in questions:
        by_category.setdefault(question.category, []).append(question)
    streams = [iter(by_category[name]) for name in sorted(by_category)]
    return list(in_proportion(streams, [1.0] * len(streams)))

"""Questions without a download: about functions of the Python standard library, from what their own docstrings say.

Each function gives one question, so that none is trained on and measured at once: what it does, how to write it, what
its documentation says in plain words, or a sum to be done in one's head.
"""

import ast
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LEAST = 40
"""Characters of a docstring worth asking about."""
UNASKED = re.compile(r">>>|\w+\(")
"""Docstrings that begin with an example or a signature."""
ASKED = (
    "What does the Python function `{name}` do? Explain it briefly, with an example.",
    "Write a Python function `{function}` that does the following, and explain how it works:\n\n{says}",
    "Rewrite this documentation of `{name}` in plain English for a beginner:\n\n{says}",
    "A program calls `{name}` {often} times a minute, and each call takes {long} milliseconds. How many seconds of "
    "every minute does it spend there, and how many calls are that in {hours} hours? Think step by step.",
)
"""Chat, code, rewriting and reasoning."""


def questions(file: Path, module: str, said: set[str]) -> Iterator[dict[str, Any]]:
    """One record for each documented public function of a source file.

    Args:
        said: documentation that has been asked about, which is not again; what is asked about now is added.
    """
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        says = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if len(says) >= LEAST and says not in said and not UNASKED.match(says):
            said.add(says)
            name = f"{module}.{node.name}"
            yield {"id": name, "prompt": _question(name, node.name, says)}


def _question(name: str, function: str, says: str) -> str:
    """Which kind, and its numbers, follow from the name."""
    drawn = hashlib.sha256(name.encode()).digest()
    numbers = {"often": 10 * (1 + drawn[1] % 60), "long": 5 * (1 + drawn[2] % 20), "hours": 2 + drawn[3] % 10}
    return ASKED[drawn[0] % len(ASKED)].format(name=name, function=function, says=says, **numbers)

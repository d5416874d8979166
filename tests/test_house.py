"""Limits of what a function, a class and a file hold. The docstring of the first two may say why more is needed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for part in ("graft_train", "inference/graft_inference") for path in (ROOT / part).rglob("*.py"))
PARAMETERS, FIELDS, LINES = 8, 20, 350
GIVEN = {"self", "cls", "ctx"}
"""Parameters that Python and autograd pass of themselves."""


def too_much(source: str) -> Iterator[str]:
    """Functions with too many parameters, and classes with too many fields, whose docstring does not say why."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count, most, reason = len([name for name in names if name not in GIVEN]), PARAMETERS, "Many parameters: "
        elif isinstance(node, ast.ClassDef):
            count, most, reason = sum(isinstance(one, ast.AnnAssign) for one in node.body), FIELDS, "Many fields: "
        else:
            continue
        if count > most and reason not in (ast.get_docstring(node) or ""):
            yield f"{node.name} has {count}, more than {most}: make it simpler, or say why after {reason!r}"


def test_no_function_and_no_class_holds_too_much():
    assert not [(str(path.relative_to(ROOT)), one) for path in FILES for one in too_much(path.read_text())]


def test_no_file_holds_too_much():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert not {path: count for path, count in lines.items() if count > LINES}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(self, a, b, c, d, e, f, g, h, *more, **others): ...", False),
        ("def f(a, b, c, d, e, f, g, *, h, i): ...", True),
        ('async def f(a, b, c, d, e, f, g, h, i): """Adds. Many parameters: all are numbers."""', False),
        ("class C:\n" + "\n".join(f"  f{number}: int" for number in range(20)), False),
        ("class C:\n" + "\n".join(f"  f{number}: int" for number in range(21)), True),
        ("def f():\n  class C:\n" + "\n".join(f"    f{number}: int" for number in range(21)), True),
    ],
)
def test_what_is_too_much(source, found):
    assert bool(list(too_much(source))) is found

"""What docs/ says of the settings and of the code is what the code says."""

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = (ROOT / "inference" / "graft_inference", ROOT / "graft_train")


def test_every_setting_is_described_as_the_code_has_it():
    assert runpy.run_path(str(DOCS / "settings.py"))["page"]() == (DOCS / "settings.md").read_text(encoding="utf-8")


def test_the_round_is_drawn_as_it_was_recorded():
    for name, svg in runpy.run_path(str(DOCS / "round.py"))["pictures"]().items():
        assert svg == (DOCS / name).read_text(encoding="utf-8")


def test_the_readme_has_the_table_of_the_quickstarts_page():
    tables = [
        [line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"\| \w+ \| \d", line)]
        for path in (ROOT / "README.md", DOCS / "quickstart.md")
    ]
    assert len(tables[0]) == 4
    assert tables[0] == tables[1]


def defined() -> tuple[set[str], set[str]]:
    """The names of all functions, and `Class.member` of all methods and fields."""
    functions, members = set(), set()
    for file in (file for package in PACKAGES for file in package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                functions.add(node.name)
            if isinstance(node, ast.ClassDef):
                methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
                annotated = {ast.unparse(part.target) for part in node.body if isinstance(part, ast.AnnAssign)}
                members |= {f"{node.name}.{name}" for name in methods | annotated}
    return functions, members


@pytest.mark.parametrize("page", ["architecture.md", "extend.md", "glossary.md"])
def test_the_files_and_functions_that_a_page_names_are_there(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    functions, members = defined()
    quoted = {one for one in re.findall(r"`([\w./]+)`", text) if "NAME" not in one}
    paths = {one for one in quoted if "/" in one and one.endswith((".py", "/"))}
    assert [one for one in paths if not any((root / one).exists() for root in (ROOT, *PACKAGES))] == []
    assert {one for one in quoted if re.fullmatch(r"[A-Z]\w+\.[a-z]\w+", one)} - members == set()
    if page == "architecture.md":  # its walks are lists of functions
        steps = " ".join(re.findall(r"^\d+\. .*(?:\n   +.*)*", text, re.MULTILINE))
        assert set(re.findall(r"`([a-z_]+)`", steps)) - functions == set()

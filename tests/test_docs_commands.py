"""Every command and every block of code in the documentation is one that the product understands."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from hydra import compose, initialize_config_dir

from graft_inference.cli import _parser as generate_parser
from graft_inference.serve.cli import _parser as serve_parser
from graft_train.cli import main
from graft_train.recipe import register, to_config
from graft_train.road import STAGES, WHOLE_ROAD

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "inference" / "README.md", *(ROOT / "docs").rglob("*.md")]
)
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
LANGUAGES = {"bash", "python", "yaml", "json", "text", "console"}
ELLIPSIS = "..."
"""In a command: further settings."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and text."""
    text = page.read_text(encoding="utf-8")
    return [
        (one[1], one[2])
        for one in re.finditer(r"^ *```(?:\{ \.)?(\w*)[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    ]


def whole(text: str) -> list[str]:
    """The commands of a block: a backslash or an open quote goes on in the next line."""
    found: list[str] = []
    for line in text.replace("\\\n", " ").split("\n"):
        if found and found[-1].count("'") % 2:
            found[-1] += "\n" + line
        else:
            found.append(line)
    return found


def piped(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, without the variables before it."""
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), "|"]:
        if word == "|" and words:
            yield words
            words = []
        elif word not in ("|", "&") and (words or not re.fullmatch(r"[A-Z0-9_]+=.*", word, re.DOTALL)):
            words.append(word)


def commands(page: Path) -> Iterator[list[str]]:
    """Words of the commands in a page's bash blocks and indented blocks, and of those within its sentences."""
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for language, body in blocks(page) if language == "bash" for line in whole(body)]
    lines += whole("\n".join(re.findall(r"^ {4}((?:graft|make|python)\b(?:.*\\\n)*.*)", prose, re.MULTILINE)))
    lines += [" ".join(one.split()) for one in re.findall(r"`((?:graft|make|python|\w+=\S* python) [^`]+)`", prose)]
    for line in lines:
        yield from piped(line)


def check_stage(name: str, overrides: list[str]) -> None:
    register()
    assert name.replace("-", "_") in {*STAGES, WHOLE_ROAD}, name
    settings = [one for one in overrides if one != ELLIPSIS and not one.startswith("--")]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        to_config(compose(name, settings))


def check_graft(words: list[str]) -> None:
    if not words or words[0].startswith("-") or words[0].isupper():
        return  # graft --help, graft STAGE
    name, *rest = words
    assert name in main.commands, f"graft {name}"
    if name == "serve":
        serve_parser("graft serve").parse_args([one for one in rest if one != "--help"] or ["BUNDLE"])
    elif name in {*STAGES, WHOLE_ROAD}:
        check_stage(name, rest)
    elif rest:
        main.commands[name].make_context(name, list(rest))


def check_script(words: list[str]) -> None:
    """A Python file of ours: it is there, and knows the options."""
    if words[0] == "-m":
        path = ROOT / "inference" / Path(*words[1].split(".")).with_suffix(".py")
        if not words[1].startswith("graft_"):
            return
        words = words[1:]
    else:
        path = ROOT / words[0]
    if "NAME" in path.name:
        return
    assert path.exists(), path
    if path.parent.name == "recipes":
        check_stage(path.stem, words[1:])
        return
    text = path.read_text(encoding="utf-8") + (ROOT / "benchmarks" / "one_process.py").read_text(encoding="utf-8")
    asked = [one.split("=")[0] for one in words[1:] if one.startswith("--")]
    missing = [one for one in asked if not re.search(rf'"(--)?{one[2:]}"', text)]
    assert missing == [], f"{words[0]} does not know {missing}"


def check(words: list[str]) -> None:
    program, rest = Path(words[0]).name, words[1:]
    recipes = [place for place, word in enumerate(words) if re.fullmatch(r"recipes/\w+\.(py|sh)", word)]
    if program == "graft":
        check_graft(rest)
    elif program == "graft-generate":
        generate_parser().parse_intermixed_args(rest)
    elif program == "graft-serve":
        serve_parser("graft-serve").parse_args(rest)
    elif program == "make":
        assert {word for word in rest if not re.fullmatch(r"[A-Z]+=.*", word)} <= TARGETS, rest
    elif program in ("python", "python3") and rest:
        check_script(rest)
    elif recipes:
        check_script(words[recipes[0] :])
    elif program == "pip":
        paths = [one.split("[")[0] for one in rest if one.startswith("./")]
        assert [one for one in paths if not (ROOT / one / "pyproject.toml").exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_of_a_page_is_understood(page):
    for words in commands(page):
        try:
            check(words)
        except SystemExit as error:  # argparse
            raise AssertionError(f"{name_of(page)}: {shlex.join(words)}") from error
        except click.ClickException as error:
            raise AssertionError(f"{name_of(page)}: {shlex.join(words)}: {error.message}") from error


def imported(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Modules, and names of them, that a block imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((one.name, None) for one in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from ((str(node.module), one.name) for one in node.names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_a_page_is_read(page):
    for language, text in blocks(page):
        assert language in LANGUAGES, f"a block of {language or 'no language'}: {text[:60]}"
        if language == "yaml":
            yaml.safe_load(text)
        if language == "python" and not text.startswith("--8<--"):
            for module, name in imported(ast.parse(text)):
                found: Any = importlib.import_module(module)
                assert name is None or hasattr(found, name), f"{module} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_a_page_links_to_is_there(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    local = [link for pair in links for link in pair if link and not re.match(r"https?:|#", link)]
    assert [link for link in local if not (page.parent / link.split("#")[0]).exists()] == []

"""The documentation site is built without a warning, holds every page, and needs no network."""

import html
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def listed(navigation: Any) -> list[str]:
    """The pages of a navigation, in its order."""
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for part in parts for page in listed(part)]


def test_every_page_is_in_the_navigation_once():
    pages = listed(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"])
    written = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert len(pages) == len(set(pages))
    assert set(pages) == written


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, root / "docs")
    shutil.copy(ROOT / "zensical.toml", root)
    for source in ("inference", "graft_train", "examples"):
        (root / source).symlink_to(ROOT / source)
    command = [Path(sys.executable).with_name("zensical"), "build", "--strict"]
    built = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return root / "site"


def test_the_site_is_built_without_a_warning_and_nothing_of_it_is_fetched(site):
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert len(pages) >= len(list(DOCS.rglob("*.md")))
    for path, text in pages.items():
        fetched = re.findall(
            r"<(?:script|link|img|source|iframe)\b[^>]*?(?:src|href|srcset)=\"?((?:https?:)?//[^\"\s>]+)", text
        )
        assert fetched == [], path


def test_the_reference_is_made_of_the_docstrings(site):
    api = (site / "api.html").read_text(encoding="utf-8")
    for name in ("GraftEngine.generate", "GraftEngine.stream", "Request", "proposer.TokenSource.propose"):
        assert f'id="graft_inference.{name}"' in api
    assert 'id="graft_train.calibrate.calibrate"' in (site / "api_train.html").read_text(encoding="utf-8")


def test_the_examples_are_shown_as_they_are(site):
    page = (site / "examples.html").read_text(encoding="utf-8")
    shown = html.unescape(re.sub(r"<[^>]+>", "", page))
    for script in (ROOT / "examples").glob("*.py"):
        assert script.read_text(encoding="utf-8").strip() in shown

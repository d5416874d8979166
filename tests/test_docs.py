"""What docs/ says of the settings is what the code says."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_every_setting_is_described_as_the_code_has_it():
    assert runpy.run_path(str(DOCS / "settings.py"))["page"]() == (DOCS / "settings.md").read_text(encoding="utf-8")

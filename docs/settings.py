"""Writes docs/settings.md: every setting of the recipes, from the dataclasses that hold them.

python docs/settings.py
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from graft_train.config import Config

HEAD = """# Settings

Every recipe takes every setting, as `key=value` after the command: `graft distill head.epochs=4`. These
are the defaults, meant for a real target; `experiment=NAME` replaces some of them by those of
`conf/experiment/NAME.yaml`. Written by `python docs/settings.py`.
"""


def page() -> str:
    """The whole text, in Markdown."""
    return "\n".join([HEAD, *_tables("Of all stages", Config, "")]) + "\n"


def _tables(title: str, section: Any, prefix: str) -> Iterator[str]:
    """The table of a section and those of the sections within it."""
    yield from _table(title, section, prefix)
    for group in fields(section):
        if is_dataclass(group.default_factory):
            yield from _tables(f"`{prefix}{group.name}`", group.default_factory, f"{prefix}{group.name}.")


def descriptions(config: Any) -> dict[str, str]:
    """What a dataclass's docstring says of its attributes, by name; one line may speak of several."""
    text = (inspect.getdoc(config) or "").partition("Attributes:\n")[2]
    found = {}
    for entry in re.split(r"\n(?=\s*[a-z_]+(?:, [a-z_]+)*: )", inspect.cleandoc(text)):
        names, _, meaning = entry.partition(": ")
        found |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    return found


def _table(title: str, config: Any, prefix: str) -> Iterator[str]:
    meanings = descriptions(config)
    yield f"\n## {title}\n\n| setting | default | |\n|---|---|---|"
    for one in fields(config):
        if is_dataclass(one.default_factory):
            continue  # a table of its own
        default = one.default if one.default is not MISSING else one.default_factory()  # type: ignore[misc]
        value = yaml.safe_dump(default, default_flow_style=True).removesuffix("...\n").strip()
        meaning = re.sub(r"\bNone\b(?! of\b)", "null", meanings[one.name]).replace("`", "").replace("|", "\\|")
        yield f"| `{prefix}{one.name}` | `{value}` | {meaning} |"


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(page(), encoding="utf-8")

"""The sources there are. Another one is a class in a file of its own, and a line here."""

from ..proposer import TokenSource
from ..tree import Source
from .prompt_lookup import PromptLookup
from .successor_matrix import MatrixSource

SOURCES: dict[str, type[TokenSource]] = {source.name: source for source in (MatrixSource, PromptLookup)}


def number_of(name: str) -> int:
    """How trees number a source."""
    return Source.DRAFTED + 1 + list(SOURCES).index(name)


def name_of(number: int) -> str:
    """A source as statistics name it: "drafted" for the head, else its own name."""
    return "drafted" if number == Source.DRAFTED else list(SOURCES)[number - Source.DRAFTED - 1]

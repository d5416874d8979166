"""The list of sources. To add one, write a class in a file of its own and name it here."""

from ..proposer import TokenSource
from ..tree import Source
from .prompt_lookup import PromptLookup
from .successor_matrix import MatrixSource

SOURCES: dict[str, type[TokenSource]] = {source.name: source for source in (MatrixSource, PromptLookup)}


def number_of(name: str) -> int:
    """The number of a source in `DraftTree.sources_N`."""
    return Source.DRAFTED + 1 + list(SOURCES).index(name)


def name_of(number: int) -> str:
    """The name of a source in the statistics: "drafted" for the head, else the source's own."""
    return "drafted" if number == Source.DRAFTED else list(SOURCES)[number - Source.DRAFTED - 1]

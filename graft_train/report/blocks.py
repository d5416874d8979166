"""What a section of the page is made of. `page.html.jinja` has the markup of each kind."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Missing:
    """What is not there, and what makes it."""

    text: str
    kind: ClassVar[str] = "missing"


@dataclass(frozen=True)
class Table:
    """Columns from the second on stand right where they hold figures.

    Attributes:
        strong: the row that begins with this word stands out.
        figures: whether its columns hold figures.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    strong: str = ""
    figures: bool = True
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Plot:
    """A Vega-Lite specification with its heading, and a sentence on how to read it."""

    title: str
    spec: dict[str, Any]
    note: str = ""
    kind: ClassVar[str] = "plot"


@dataclass(frozen=True)
class Heading:
    """Of what follows within the section."""

    text: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Beside:
    """Blocks that stand side by side where there is room."""

    blocks: Sequence[Any]
    kind: ClassVar[str] = "beside"


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown when asked for."""

    title: str
    blocks: Sequence[Any]
    kind: ClassVar[str] = "folded"


@dataclass(frozen=True)
class Cards:
    """The few figures that matter most: value, name, and what it is of."""

    cards: Sequence[tuple[str, str, str]]
    kind: ClassVar[str] = "cards"


@dataclass(frozen=True)
class Rounds:
    """The trace viewer; its data are the page's."""

    kind: ClassVar[str] = "rounds"


@dataclass(frozen=True)
class Section:
    """Attributes:
    name: of its anchor.
    """

    name: str
    title: str
    blocks: list[Any] = field(default_factory=list)

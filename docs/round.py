"""Draws docs/round-light.svg and docs/round-dark.svg: one real round, which docs/record_round.py wrote to round.json.

python docs/round.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
WIDTH, MARGIN, TOKEN = 800, 20, 30
"""Pixels: of the picture, around a panel's content, and the height of a token."""
CHARACTER = 9.0
"""Width of a character of a token, at 15 pixels of a monospaced font."""
TEXT = 50
"""Characters of the text so far."""
LEFT, SHARE, APART = 56, 40, 24
"""Left edge of the roots, room for a probability, and the least room for a branch."""
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"
LIGHT = {
    "page": "#ffffff", "panel": "#f6f7f9", "line": "#cbd2db", "ink": "#1b2430", "quiet": "#5b6776",
    "head": "#0b7a53", "lookup": "#8a2fb8", "root": "#1b2430", "target": "#b45309", "stop": "#c2410c",
}  # fmt: skip
DARK = {
    "page": "#12161c", "panel": "#1b212a", "line": "#3a4452", "ink": "#e8edf3", "quiet": "#9aa7b6",
    "head": "#4ed6a1", "lookup": "#d59bf6", "root": "#e8edf3", "target": "#f5b45c", "stop": "#fb923c",
}  # fmt: skip
Place = tuple[float, float]


class Picture:
    """SVG as it grows; every method draws one thing."""

    def __init__(self, colors: dict[str, str]) -> None:
        self.colors = colors
        self.parts: list[str] = []

    def paint(self, color: str) -> str:
        """Of a name; what head and look-up agree on runs from one into the other."""
        return "url(#both)" if color == "both" else self.colors[color]

    def text(
        self, place: Place, words: str, color: str, size: float = 15, style: str = "", anchor: str = "start"
    ) -> None:
        self.parts.append(
            f'<text x="{place[0]:g}" y="{place[1]:g}" fill="{self.paint(color)}" font-size="{size:g}" '
            f'text-anchor="{anchor}" {style}>{escape(words)}</text>'
        )

    def panel(self, top: float, height: float, number: int, title: str, words: str) -> None:
        self.parts.append(
            f'<rect x="0.5" y="{top:g}" width="{WIDTH - 1}" height="{height:g}" rx="12" fill="{self.colors["panel"]}" '
            f'stroke="{self.colors["line"]}"/>'
            f'<circle cx="{MARGIN + 14}" cy="{top + 27:g}" r="13" fill="{self.colors["ink"]}"/>'
        )
        number_style = 'font-weight="700"'
        self.text((MARGIN + 14, top + 32), str(number), "panel", 14, number_style, "middle")
        self.text((MARGIN + 38, top + 32), title, "ink", 17, 'font-weight="650"')
        self.text((WIDTH - MARGIN, top + 32), words, "quiet", 14, "", "end")

    def token(self, place: Place, token: str, color: str, share: float | None = None, faded: bool = False) -> None:
        """A token with what speaks for it; faded where it was rejected or found no place."""
        x, y = place
        words = shown(token)
        opacity = 0.5 if faded else 1
        self.parts.append(f'<g opacity="{opacity}">')
        dash = 'stroke-dasharray="4 3"' if faded else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y - TOKEN / 2:g}" width="{wide(token):g}" height="{TOKEN}" rx="7" '
            f'fill="{self.paint(color)}" fill-opacity="{0 if faded else 0.13}" stroke="{self.paint(color)}" '
            f'stroke-width="1.6" {dash}/>'
        )
        mono = f'font-family="{MONO}" font-weight="600"'
        self.text((x + wide(token) / 2, y + 5), words, color, 15, mono, "middle")
        if share is not None:
            self.text((x + wide(token) + 6, y + 5), f"{share:.0%}", "quiet", 12.5)
        self.parts.append("</g>")

    def branch(self, start: Place, end: Place, color: str, strong: bool = False) -> None:
        (x, y), (to_x, to_y), middle = start, end, (start[0] + end[0]) / 2
        stroke, width, opacity = (
            self.colors["head" if color == "both" else color],
            *((3.2, 1) if strong else (1.6, 0.55)),
        )
        self.parts.append(
            f'<path d="M{x:g} {y:g} C{middle:g} {y:g} {middle:g} {to_y:g} {to_x:g} {to_y:g}" fill="none" '
            f'stroke="{stroke}" stroke-width="{width}" stroke-opacity="{opacity}"/>'
        )

    def svg(self, height: float, title: str) -> str:
        stops = "".join(
            f'<stop offset="{place}" stop-color="{self.colors[name]}"/>'
            for place, name in ((0.3, "head"), (0.7, "lookup"))
        )
        body = "\n".join([f'<defs><linearGradient id="both">{stops}</linearGradient></defs>', *self.parts])
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
            f'height="{height:g}" role="img" font-family="{SANS}">\n<title>{escape(title)}</title>\n'
            f'<rect width="{WIDTH}" height="{height:g}" rx="12" fill="{self.colors["page"]}"/>\n{body}\n</svg>\n'
        )


def shown(token: str) -> str:
    """A token as people can see it: spaces and line breaks are marked."""
    return token.replace(" ", "\u00b7").replace("\n", "\u21b5")


def wide(token: str) -> float:
    return CHARACTER * max(len(token), 1) + 20


def children(nodes: Sequence[dict[str, Any]], parent: int) -> list[int]:
    """By falling probability, what was accepted first."""
    found = [index for index, node in enumerate(nodes) if index and node["parent"] == parent]
    return sorted(found, key=lambda index: (not nodes[index].get("accepted"), -nodes[index]["p"]))


def path_of(nodes: Sequence[dict[str, Any]], index: int) -> tuple[str, ...]:
    """The tokens from the root to a node."""
    return (*path_of(nodes, nodes[index]["parent"]), nodes[index]["token"]) if index else ()


def colors_of(one: dict[str, Any]) -> list[str]:
    """Who proposed each node of the tree: the head, look-up, or both."""
    drafted = {path_of(one["drafted"], index) for index in range(len(one["drafted"]))}
    chain = [node["token"] for node in one["lookup"]]
    looked = {tuple(chain[:length]) for length in range(1, len(chain) + 1)}
    paths = [path_of(one["tree"], index) for index in range(len(one["tree"]))]
    both = [path in drafted and path in looked for path in paths]
    return ["both" if agreed else node["source"] for agreed, node in zip(both, one["tree"], strict=True)]


def draw_draft(picture: Picture, top: float, one: dict[str, Any]) -> float:
    """The head's steps and where they stop; returns the panel's height."""
    nodes, columns, gap = one["drafted"], (LEFT, 186, 326), 38
    firsts = children(nodes, 0)[:4]
    height = 62 + gap * len(firsts)
    picture.panel(top, height, 1, "The head drafts", f"{max(node['depth'] for node in nodes)} steps, likeliest first")
    rows = [top + 68 + gap * place for place in range(len(firsts))]
    root = (columns[0], (rows[0] + rows[-1]) / 2)
    seconds = [(first, second) for first in firsts for second in children(nodes, first)]
    seconds = sorted(
        sorted(seconds, key=lambda pair: -nodes[pair[1]]["p"])[: len(rows)], key=lambda pair: firsts.index(pair[0])
    )
    for first, y in zip(firsts, rows, strict=True):
        picture.branch((root[0] + wide(one["root"]), root[1]), (columns[1], y), "head")
        picture.token((columns[1], y), nodes[first]["token"], "head", nodes[first]["p"])
    for (first, second), y in zip(seconds, rows, strict=False):
        start = columns[1] + wide(nodes[first]["token"]) + SHARE
        picture.branch((start, rows[firsts.index(first)]), (columns[2], y), "head")
        picture.token((columns[2], y), nodes[second]["token"], "head", nodes[second]["p"])
    picture.token(root, one["root"], "root")
    edge, middle = 468, (rows[0] + rows[-1]) / 2
    picture.parts.append(
        f'<line x1="{edge}" y1="{rows[0] - 18:g}" x2="{edge}" y2="{rows[-1] + 18:g}" stroke="{picture.colors["stop"]}" '
        f'stroke-width="2" stroke-dasharray="3 5" stroke-linecap="round"/>'
    )
    picture.text((edge + 18, middle - 16), "Unsure: drafting stops.", "stop", 16, 'font-weight="650"')
    picture.text((edge + 18, middle + 8), f"Its best path has {one['confidence']:.0%}; a further", "quiet", 14)
    picture.text((edge + 18, middle + 28), f"step needs more than {one['threshold']:.0%}.", "quiet", 14)
    return height


def draw_lookup(picture: Picture, top: float, one: dict[str, Any]) -> float:
    """What followed the same words earlier in the request; returns the panel's height."""
    height = 118
    picture.panel(top, height, 2, "The rest is looked up", "in the request's own text, without a model")
    x, y = float(LEFT), top + 70
    picture.token((x, y), one["root"], "root")
    x += wide(one["root"])
    for node in one["lookup"]:
        width = wide(node["token"])
        if x + 18 + width > WIDTH - MARGIN - 30:
            picture.text((x + 14, y + 5), "…", "quiet", 16)
            break
        picture.branch((x, y), (x + 18, y), "lookup")
        picture.token((x + 18, y), node["token"], "lookup")
        picture.text((x + 18 + width / 2, y + 32), f"{node['p']:.0%}", "quiet", 12.5, "", "middle")
        x += 18 + width
    return height


def places(nodes: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """Column and row of every node: a first child stands beside its parent, others below it."""
    found, taken = {0: (0, 0)}, {(0, 0)}

    def put(parent: int) -> None:
        for child in children(nodes, parent):
            column, row = nodes[child]["depth"], found[parent][1]
            while (column, row) in taken:
                row += 1
            found[child] = (column, row)
            taken.add((column, row))
            put(child)

    put(0)
    return [found[index] for index in range(len(nodes))]


def draw_tree(picture: Picture, top: float, one: dict[str, Any]) -> float:
    """The tree that is verified, and which path the target follows; returns the panel's height."""
    path = [index for index, node in enumerate(one["tree"]) if node["accepted"]]
    bonus = {
        "token": one["bonus"],
        "parent": path[-1],
        "depth": len(path),
        "p": 2.0,
        "source": "target",
        "accepted": True,
    }
    nodes, gap = [*one["tree"], bonus], 42
    colors = [*colors_of(one), "target"]
    spots = places(nodes)
    height = 70 + gap * (1 + max(row for _, row in spots))
    picture.panel(
        top, height, 3, "One pass of the target verifies the tree", f"{len(one['tree'])} nodes, the likeliest of both"
    )
    lefts = [float(LEFT)]
    for depth in range(max(node["depth"] for node in nodes)):
        widest = max(wide(node["token"]) for node in nodes if node["depth"] == depth)
        lefts.append(lefts[-1] + widest + APART + (SHARE if depth else APART))
    at = [(lefts[column], top + 72 + gap * row) for column, row in spots]
    for index, node in enumerate(nodes[1:], start=1):
        parent = node["parent"]
        end = at[parent][0] + wide(nodes[parent]["token"]) + (SHARE if nodes[parent]["depth"] else 0)
        picture.branch((end, at[parent][1]), at[index], colors[index], node["accepted"])
    for place, node, color in zip(at, nodes, colors, strict=True):
        share = node["p"] if node["source"] in ("head", "lookup") else None
        picture.token(place, node["token"], color, share, not node["accepted"])
    return height


def draw_result(picture: Picture, top: float, one: dict[str, Any]) -> float:
    """What the round emits; returns the panel's height."""
    found = zip(one["tree"], colors_of(one), strict=True)
    tokens = [(node["token"], color) for node, color in found if node["accepted"]][1:]
    height = 96
    picture.panel(
        top,
        height,
        4,
        f"{len(tokens) + 1} tokens for one pass",
        "each is the token that the target alone would have written",
    )
    x, y = float(LEFT), top + 66
    for token, color in [*tokens, (one["bonus"], "target")]:
        picture.token((x, y), token, color)
        x += wide(token) + 6
    for words, color in (("head", "head"), ("looked up", "lookup"), ("both", "both"), ("target's own", "target")):
        picture.parts.append(
            f'<rect x="{x + 24:g}" y="{y - 6:g}" width="12" height="12" rx="3" fill="{picture.paint(color)}"/>'
        )
        picture.text((x + 42, y + 5), words, "quiet", 14)
        x += 34 + 8 * len(words)
    return height


def draw(one: dict[str, Any], colors: dict[str, str]) -> str:
    """The whole picture, as SVG."""
    picture = Picture(colors)
    mono = f'font-family="{MONO}"'
    text = "…" + shown(one["text"][-TEXT:]).replace("\u00b7", " ")
    picture.text((MARGIN, 40), text, "ink", 15, mono + ' xml:space="preserve"')
    picture.token((MARGIN + CHARACTER * len(text) + 8, 35), one["root"], "root")
    picture.text((WIDTH - MARGIN, 40), "the text so far", "quiet", 14, "", "end")
    top = 64.0
    for part in (draw_draft, draw_lookup, draw_tree, draw_result):
        top += part(picture, top, one) + 10
    return picture.svg(top, "One round: the head drafts and stops, prompt lookup fills in, one pass verifies the tree")


def pictures() -> dict[str, str]:
    """The text of each file, by its name."""
    one = json.loads((HERE / "round.json").read_text(encoding="utf-8"))
    return {"round-light.svg": draw(one, LIGHT), "round-dark.svg": draw(one, DARK)}


if __name__ == "__main__":
    for name, svg in pictures().items():
        (HERE / name).write_text(svg, encoding="utf-8")

"""Draws docs/architecture.png: the stages of a run, and one round of the engine.

python docs/architecture.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, LINE = "#1e293b", "#64748b"
STAGE, ENGINE, PROPOSER, TARGET = "#fef3c7", "#e2e8f0", "#ccfbf1", "#fee2e2"
WIDTH, HEIGHT = 29, 9.5
TOP, STAGES_X, TARGET_X, ROUND_X, PROPOSER_X = 89, 17, 62, 104, 146
STAGES = (
    ("regenerate", "data/"),
    ("distill", "head/"),
    ("build_corpus", "corpus/"),
    ("calibrate", "policy/"),
    ("export", "bundle/"),
    ("evaluate", "evaluation/"),
)
ROUND = (
    ("1  draft", "Speculator.draft"),
    ("2  build the tree", "Speculator.build"),
    ("3  verify", "Target.verify_all"),
    ("4  draw, accept", "judge"),
    ("5  commit, observe", "commit, keep"),
)
Place = tuple[float, float]


def box(axes: Axes, place: Place, title: str, body: str, color: str) -> None:
    """A box around its middle; the function or the folder stands beneath the title."""
    x, y = place
    corner = (x - WIDTH / 2, y - HEIGHT / 2)
    axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, "round,pad=0,rounding_size=1.2", fc=color, ec=LINE, lw=1.1))
    axes.text(x, y + 1.7, title, ha="center", va="center", fontsize=10.5, weight="bold", color=INK)
    axes.text(x, y - 2.2, body, ha="center", va="center", fontsize=8.8, family="monospace", color=INK)


def arrow(axes: Axes, *places: Place, style: str = "-|>") -> None:
    """An arrow along these points; both ends have a head with the style "<|-|>"."""
    *corners, before, end = places
    if corners:
        axes.plot(*zip(*corners, before, strict=True), color=LINE, lw=1.3)
    axes.add_patch(FancyArrowPatch(before, end, arrowstyle=style, mutation_scale=13, color=LINE, lw=1.3, shrinkA=0))


def column(axes: Axes, x: float, gap: float, parts: tuple[tuple[str, str], ...], color: str) -> None:
    """Boxes one below the other, each with an arrow from the one above."""
    for number, (title, body) in enumerate(parts):
        y = TOP - gap * number
        box(axes, (x, y), title, body, color)
        if number:
            arrow(axes, (x, y + gap - HEIGHT / 2), (x, y + HEIGHT / 2))


def draw(axes: Axes) -> None:
    """graft_train on the left; the engine, the target, the round and the proposers on the right."""
    for x, title in ((STAGES_X, "graft_train: a run"), (ROUND_X, "graft_inference: one round (decode/round.py)")):
        axes.text(x, 99, title, ha="center", fontsize=12, weight="bold", color=INK)
    gap, edge = 17.5, WIDTH / 2
    column(axes, STAGES_X, 15.5, STAGES, STAGE)
    column(axes, ROUND_X, gap, ROUND, ENGINE)
    box(axes, (TARGET_X, TOP), "engine", "GraftEngine.generate", ENGINE)
    box(axes, (TARGET_X, TOP - 2 * gap), "target", "target/", TARGET)
    box(axes, (TARGET_X, TOP - 3 * gap), "noise of the draws", "decode/sampling.py", TARGET)
    box(axes, (PROPOSER_X, TOP), "draft head", "heads/eagle3/", PROPOSER)
    box(axes, (PROPOSER_X, TOP - gap), "sources", "retrieval/", PROPOSER)
    box(axes, (PROPOSER_X, TOP - 2 * gap), "plan, P(accepted)", "policy/", PROPOSER)
    rows = [TOP - gap * number for number in range(len(ROUND))]
    box(axes, (TARGET_X, rows[4]), "new tokens", "stats, streamer", ENGINE)
    for y in rows[:2]:
        arrow(axes, (ROUND_X + edge, y), (PROPOSER_X - edge, y), style="<|-|>")
    arrow(axes, (PROPOSER_X - edge, rows[2]), (123, rows[2]), (123, rows[1] - 3), (ROUND_X + edge, rows[1] - 3))
    arrow(axes, (TARGET_X + edge, rows[0]), (ROUND_X - edge, rows[0]))
    arrow(axes, (TARGET_X + edge, rows[2]), (ROUND_X - edge, rows[2]), style="<|-|>")
    arrow(axes, (TARGET_X + edge, rows[3]), (ROUND_X - edge, rows[3]))
    arrow(axes, (ROUND_X - edge, rows[4]), (TARGET_X + edge, rows[4]))
    # What was accepted goes back to those who propose.
    back = PROPOSER_X + edge + 6
    for y in rows[:2]:
        arrow(axes, (ROUND_X + edge, rows[4]), (back, rows[4]), (back, y), (PROPOSER_X + edge, y))
    between = (STAGES_X + TARGET_X) / 2
    export = TOP - 15.5 * 4
    arrow(axes, (STAGES_X + edge, export), (between, export), (between, TOP), (TARGET_X - edge, TOP))
    for x, y, text in ((PROPOSER_X, rows[4] + 2, "what was accepted"), (between + 6.5, 60, "bundle")):
        axes.text(x, y, text, ha="center", fontsize=9.5, style="italic", color=INK)


def main() -> None:
    """Writes the picture beside this script."""
    figure, axes = plt.subplots(figsize=(14, 8))
    axes.set(xlim=(0, 178), ylim=(4, 103))
    axes.axis("off")
    draw(axes)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()

"""What was found, for people and for programs."""

import json
import math
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from graft_train.doctor.finding import CAUSE, FINE, HINT, UNCHECKED, Finding

STYLES = {CAUSE: "bold red", HINT: "yellow", FINE: "green", UNCHECKED: "dim"}
WHOSE = {"trained": "on training answers", "held_out": "on other answers", "yours": "on answers to your prompts"}


def show(place: str, target: str, lengths: dict[str, float], steps: int, findings: list[Finding]) -> None:
    """Prints causes and hints at length, and of all else a line each."""
    console = Console()
    causes = [finding for finding in findings if finding.verdict == CAUSE]
    hints = [finding for finding in findings if finding.verdict == HINT]
    console.print(Panel(Text(_summary(lengths, steps, causes, hints)), title=Text(f"{place} on {target}")))
    for finding in [*causes, *hints]:
        console.print(Panel(_at_length(finding), title=Text(f"{finding.verdict}: {finding.name}"), title_align="left",
                            border_style=STYLES[finding.verdict]))  # fmt: skip
    rest = Table.grid(padding=(0, 2))
    rest.add_column(style="bold")
    rest.add_column()
    rest.add_column(overflow="fold")
    for finding in findings:
        if finding.verdict in (FINE, UNCHECKED):
            rest.add_row(finding.name, Text(finding.verdict, STYLES[finding.verdict]), Text(finding.seen))
    console.print(rest)


def _summary(lengths: dict[str, float], steps: int, causes: list[Finding], hints: list[Finding]) -> str:
    chains = ", ".join(f"{length:.2f} {WHOSE[name]}" for name, length in lengths.items() if name in WHOSE)
    lines = [f"acceptance length of a chain of {steps}: {chains}"] if chains else []
    if "decoded" in lengths:
        lines.append(f"acceptance length decoded with the head's own plan: {lengths['decoded']:.2f}")
    if causes:
        lines.append(
            f"likely why it is low: {', '.join(finding.name for finding in causes)} (the first may explain the others)"
        )
    elif hints:
        lines.append(f"no clear cause; worth a look: {', '.join(finding.name for finding in hints)}")
    else:
        lines.append("nothing found")
    return "\n".join(lines)


def _at_length(finding: Finding) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name in ("seen", "usual", "remedy"):
        grid.add_row(name, Text(getattr(finding, name)))
    return grid


def to_json(values: dict[str, Any]) -> str:
    """As JSON, which has no infinities."""
    return json.dumps(_finite(values), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

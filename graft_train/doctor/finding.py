"""What a check finds."""

from dataclasses import dataclass, field

CAUSE, HINT, FINE, UNCHECKED = "cause", "hint", "fine", "not checked"
VERDICTS = (CAUSE, HINT, FINE, UNCHECKED)
"""The worst first. A hint is worth a look, and not by itself why acceptance is low."""
NOT_HERE = "no answer is here that the head was trained on"
"""Why much of a bundle's or an adopted head's training cannot be checked."""


@dataclass(frozen=True)
class Finding:
    """Attributes:
    name: of the check, as docs/troubleshooting.md has it.
    verdict: one of `VERDICTS`.
    seen: what was seen, with its figure; of a check that could not be made, why not.
    usual: what a healthy head shows there.
    remedy: a command or a setting.
    figures: the numbers, for programs.
    """

    name: str
    verdict: str
    seen: str
    usual: str = ""
    remedy: str = ""
    figures: dict[str, float] = field(default_factory=dict)


def unchecked(name: str, why: str) -> Finding:
    """Of a check that could not be made."""
    return Finding(name, UNCHECKED, why)


def ordered(findings: list[Finding]) -> list[Finding]:
    """Causes first, and among them those that most often are the cause, in the order of the checks."""
    return sorted(findings, key=lambda finding: VERDICTS.index(finding.verdict))


def judged(value: float, cause: float, hint: float) -> str:
    """The verdict on a figure that ought to be high: a cause below `cause`, a hint below `hint`."""
    return CAUSE if value < cause else HINT if value < hint else FINE

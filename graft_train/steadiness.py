"""What a report says of figures of an unsteady machine."""

from graft_inference.steadiness import UNSTEADY


def distrust(found: float, what: str, remedy: str) -> str | None:
    """What a report says beside its figures where the machine was unsteady.

    Args:
        found: the variation.
        what: of which work.
        remedy: what to do about it, beside an idle machine.
    """
    if found <= UNSTEADY:
        return None
    return (
        f"These figures cannot be trusted: within the run the time of {what} varied by {found:.0%} (interquartile "
        f"range over median). Measure again on an idle machine, or {remedy}."
    )

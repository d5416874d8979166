"""What settings may be, checked where they are made."""

from typing import Any

from graft_inference.errors import GraftError


def check_least(group: str, settings: Any, least: dict[str, int]) -> None:
    """Raises GraftError for the first of these settings that is below its bound; names it as the command line does."""
    for name, bound in least.items():
        if getattr(settings, name) < bound:
            raise GraftError(f"{group}.{name}={getattr(settings, name)} must be at least {bound}")

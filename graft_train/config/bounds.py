"""What settings may be, checked where they are made."""

from typing import Any
from urllib.parse import urlsplit

from graft_inference.errors import GraftError


def check_least(group: str, settings: Any, least: dict[str, int]) -> None:
    """Raises GraftError for the first of these settings that is below its bound; names it as the command line does."""
    for name, bound in least.items():
        if getattr(settings, name) < bound:
            raise GraftError(f"{group}.{name}={getattr(settings, name)} must be at least {bound}")


def check_servers(setting: str, given: Any, urls: list[Any]) -> None:
    """Raises GraftError unless these are addresses of servers, without a key in them, which files would keep.

    Args:
        given: what the setting holds, for errors.
    """
    if not all(isinstance(url, str) and url.startswith(("http://", "https://")) for url in urls):
        raise GraftError(f"{setting}={given} must be one http(s) address or a list of them")
    if any("@" in urlsplit(url).netloc for url in urls):
        raise GraftError(f"{setting} has a name or a key in it, which files would show: use OPENAI_API_KEY")

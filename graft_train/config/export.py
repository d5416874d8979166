"""Settings of `export`."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class ExportConfig:
    """Attributes:
    license: of the bundle, as the Hub names it; a head inherits its target's terms.
    push_to_hub: whether to upload the bundle.
    repo_id: where to, "you/name".
    private: whether a repository that is new becomes a private one.
    """

    license: str = "apache-2.0"
    push_to_hub: bool = False
    repo_id: str | None = None
    private: bool = True

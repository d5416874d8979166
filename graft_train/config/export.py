"""Settings of `export`."""

from dataclasses import dataclass, field

from graft_inference.errors import GraftError

ENGINES = ("vllm", "sglang", "llama_cpp", "openvino")
"""Other engines that load heads."""


@dataclass(slots=True, kw_only=True)
class ExportConfig:
    """Attributes:
    engines: those of vllm, sglang, llama_cpp and openvino that are to serve the head: a head that one of them would
        run wrong is refused. openvino gets a directory of its own in the bundle, as its converter takes it; the others
        take the bundle. The model card says of all four what they need.
    license: of the bundle, as the Hub names it; a head inherits its target's terms.
    push_to_hub: whether to upload the bundle.
    repo_id: where to, "you/name".
    private: whether a repository that is new becomes a private one.
    """

    engines: list[str] = field(default_factory=list)
    license: str = "apache-2.0"
    push_to_hub: bool = False
    repo_id: str | None = None
    private: bool = True

    def __post_init__(self) -> None:
        if unknown := [engine for engine in self.engines if engine not in ENGINES]:
            raise GraftError(f"export.engines={unknown} are unknown; choose among {', '.join(ENGINES)}")

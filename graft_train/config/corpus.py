"""Settings of the `build_corpus` stage."""

from dataclasses import asdict, dataclass, field
from typing import Any

from graft_inference.errors import GraftError
from graft_train.config.bounds import check_least


@dataclass(slots=True, kw_only=True)
class CorpusConfig:
    """What is counted, and how much of it is kept.

    Attributes:
        successors: successors kept per token, k.
        text_only: count what follows each token in the data, instead of asking the target what should.
        prompts: whether the prompts' tokens count too, or the answers' alone.
        held_out: share of the samples' documents left out of the corpus and used to measure it.
        merge: matrices that served engines saved, to be added.
        memory_mb: for the counts while they are summed; what does not fit goes to the disk.
        batch_tokens: padded tokens per pass of the target.
    """

    successors: int = 8
    text_only: bool = False
    prompts: bool = True
    held_out: float = 0.02
    merge: list[str] = field(default_factory=list)
    memory_mb: int = 512
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        check_least("corpus", self, {"successors": 1, "memory_mb": 128, "batch_tokens": 1})
        if not 0 <= self.held_out < 1:
            raise GraftError(f"corpus.held_out={self.held_out} must lie in 0..1, 1 excluded")

    def decisive(self) -> dict[str, Any]:
        """The settings that decide what comes out."""
        return {name: value for name, value in asdict(self).items() if name != "memory_mb"}

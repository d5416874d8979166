"""Settings of the data: where documents come from, and how they are divided."""

from dataclasses import dataclass, field
from typing import Any

from graft_inference.errors import GraftError


@dataclass(kw_only=True)
class Source:
    """One of several sources.

    Attributes:
        path: as data.path.
        weight: its share of the prompts, relative to the other weights; one that runs out leaves the rest
            to the others.
        hub_split: which split of a data set from the Hub is read; null means data.hub_split.
    """

    path: str
    weight: float = 1.0
    hub_split: str | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise GraftError(f"the weight of the source {self.path} must be positive, not {self.weight}")


@dataclass(slots=True)
class DataConfig:
    """Where documents come from and how they are divided.

    Attributes:
        path: a JSONL, JSON, Parquet or Arrow file of records, a text file, a directory of either kind, the id of a
            data set that `datasets` can load, or "questions" (hundreds about the functions of the Python standard
            library: chat, code, rewriting and reasoning).
        sources: several paths with weights, read in place of `path`.
        hub_split: which split of a data set from the Hub is read.
        hub_subset: which subset (`datasets` calls it name), where it has several.
        streaming: read the first `limit` rows of a data set from the Hub without downloading the rest.
        glob: which files of a directory are read.
        calibration_share: part of the documents kept for calibrating the policy.
        evaluation_share: part of the documents kept for the final measurement and the held-out loss.
        limit: read at most this many documents of each source; null reads all.
        prompt_tokens: length of a prompt that is cut from plain text; conversations keep their own.
        chat_template_kwargs: variables of the target's chat template, such as
            {enable_thinking: false} for Qwen3 or {reasoning_effort: low} for gpt-oss.
        on_error: raise (the first bad record is an error) or skip (bad records are left out and counted).
        preview: show a few samples with their trained tokens coloured, and stop before the target runs.
    """

    path: str | None = None
    sources: list[Source] = field(default_factory=list)
    hub_split: str = "train"
    hub_subset: str | None = None
    streaming: bool = False
    glob: str = "**/*"
    calibration_share: float = 0.05
    evaluation_share: float = 0.05
    limit: int | None = None
    prompt_tokens: int = 256
    chat_template_kwargs: Any = None
    on_error: str = "raise"
    preview: bool = False

    def __post_init__(self) -> None:
        shares = self.calibration_share, self.evaluation_share
        if min(shares) < 0 or sum(shares) >= 1:
            raise GraftError(
                f"data.calibration_share={shares[0]} and data.evaluation_share={shares[1]} must not be "
                "negative and must leave some documents for training"
            )
        if self.limit is not None and self.limit < 1:
            raise GraftError(f"data.limit={self.limit} must be at least 1, or null for all documents")
        if self.streaming and self.limit is None:
            raise GraftError("data.streaming=true reads only the first documents: say how many with data.limit")
        if self.prompt_tokens < 1:
            raise GraftError(f"data.prompt_tokens={self.prompt_tokens} must be at least 1")
        if not isinstance(self.chat_template_kwargs, dict | None):
            raise GraftError(
                f"data.chat_template_kwargs={self.chat_template_kwargs} must be names and values in braces"
            )
        if self.on_error not in ("raise", "skip"):
            raise GraftError(f"data.on_error={self.on_error} is unknown; choose raise or skip")

    def all_sources(self) -> list[Source]:
        """Raises GraftError where none is named."""
        if self.sources:
            return self.sources
        if self.path is None:
            raise GraftError(
                "data.path is not set: give a JSONL, JSON or Parquet file, a directory, a `datasets` id, or questions"
            )
        return [Source(path=self.path)]

    def __str__(self) -> str:
        return "data.path=" + ", ".join(source.path for source in self.all_sources())

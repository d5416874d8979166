"""Bad records: either the first one stops the work, or all are left out and counted."""

from typing import Self

from graft_inference.errors import GraftError
from graft_train.config.data import DataConfig
from graft_train.processes import say

SHOWN = 5


class BadRecord(GraftError):
    """A single record is at fault, so that the others can do without it."""


class BadRecords:
    """Args:
    skip: data.on_error=skip.
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.complaints: list[str] = []
        self.count = 0

    @classmethod
    def of(cls, config: DataConfig) -> Self:
        return cls(config.on_error == "skip")

    def add(self, error: BadRecord) -> None:
        """Raises `error`, or counts it."""
        if not self.skip:
            raise GraftError(f"{error}. data.on_error=skip leaves such records out") from error
        self.count += 1
        if len(self.complaints) < SHOWN:
            self.complaints.append(str(error))

    def report(self, of: str) -> None:
        """Says how many were left out, and why the first ones were.

        Args:
            of: what they were part of, with its number: "120 records".
        """
        if self.count:
            rest = self.count - len(self.complaints)
            lines = [f"data: left out {self.count} of {of}:", *self.complaints, *([f"... {rest} more"] if rest else [])]
            say("\n  ".join(lines))

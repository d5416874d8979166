"""Samples: what `regenerate` writes and every later stage reads, one JSON object a line."""

import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from graft_inference.errors import GraftError
from graft_inference.files import parse_json
from graft_train.data.documents import SPLITS


@dataclass(frozen=True)
class Sample:
    """A sequence of tokens and which of them are answers; none are outside the train split.

    Attributes:
        ids: prompt and answer, or a whole conversation with several answers; kept as an array, which takes a
            tenth of a list's memory.
        answers: [start, end) of each answer, ascending, apart from each other; the end-of-sequence token is
            part of an answer where it came.
        sampling: how the target drew the answer (temperature, seed, ...); empty where it did not.
    """

    id: str
    split: str
    ids: Sequence[int]
    answers: list[list[int]] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", array("i", self.ids))

    @property
    def document(self) -> str:
        """What it was made of: samples of one document, whose ids differ in a number at their end, share text."""
        return re.sub(r"[@#]\d+$", "", self.id)

    @property
    def is_turn(self) -> bool:
        """Whether it is a conversation up to one of its answers, and repeats what led to the answers before."""
        return re.search(r"#\d+$", self.id) is not None

    @property
    def prompt_ids(self) -> list[int]:
        """What comes before the first answer."""
        return list(self.ids[: self.answers[0][0]] if self.answers else self.ids)

    @property
    def answer_ids(self) -> list[int]:
        """The tokens of all answers."""
        return [token for start, end in self.answers for token in self.ids[start:end]]

    @property
    def loss_mask_S(self) -> Tensor:
        """bool, the tokens of the answers."""
        loss_mask_S = torch.zeros(len(self.ids), dtype=torch.bool)
        for start, end in self.answers:
            loss_mask_S[start:end] = True
        return loss_mask_S

    def cut(self, length: int) -> "Sample | None":
        """At most `length` tokens: it ends with the last answer that fits whole. Where not even the first
        does, that one loses its end; None if nothing of it is left.
        """
        if len(self.ids) <= length:
            return self
        whole = [[start, end] for start, end in self.answers if end <= length]
        if not whole and self.answers and self.answers[0][0] < length:
            whole = [[self.answers[0][0], length]]
        return replace(self, ids=self.ids[: whole[-1][1]], answers=whole) if whole else None


def answered(identity: str, prompt_ids: list[int], answer_ids: list[int], sampling: dict[str, Any]) -> Sample:
    """A training sample of one prompt and what the target wrote behind it."""
    ids = prompt_ids + answer_ids
    return Sample(identity, "train", ids, [[len(prompt_ids), len(ids)]] if answer_ids else [], sampling)


FIELDS = {field.name for field in fields(Sample)}


def to_line(sample: Sample) -> bytes:
    return (json.dumps(asdict(sample) | {"ids": list(sample.ids)}, separators=(",", ":")) + "\n").encode()


def append_samples(file: BinaryIO, samples: Iterable[Sample]) -> None:
    """Appends in a single write that has reached the disk when this returns."""
    file.write(b"".join(map(to_line, samples)))
    file.flush()
    os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[Sample]:
    """The samples of a file, checked, as far as its lines are whole; none where there is no file."""
    if path.exists():
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.endswith(b"\n"):
                    yield parse_sample(line, f"{path}, line {number}")


def keep_lines(path: Path, count: int) -> None:
    """Cuts a file behind its first lines, where there is one."""
    if path.exists():
        with path.open("rb") as lines:
            size = sum(len(line) for line in islice(lines, count))
        os.truncate(path, size)


def read_samples(path: Path, split: str) -> list[Sample]:
    """The samples of one split, validated.

    Raises:
        GraftError: missing or empty file, a line that is no sample (numbered), a training sample whose
            answer, and so whose loss mask, is empty (named), or a split without samples.
    """
    if not path.is_file():
        raise GraftError(f"{path} does not exist; run graft regenerate first")
    with path.open("rb") as lines:
        samples = [parse_sample(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    if not samples:
        raise GraftError(f"{path} is empty; delete its directory and run graft regenerate again")
    chosen = [sample for sample in samples if sample.split == split]
    if not chosen:
        raise GraftError(f"{path} has no sample of the {split} split; run graft regenerate on more data")
    return chosen


def check_room(
    samples: Sequence[Sample], max_new_tokens: int, positions: int, setting: str, bound: str = "target's"
) -> None:
    """Raises GraftError for a prompt behind which so many new tokens do not fit.

    Args:
        positions: most tokens of prompt and continuation together.
        setting: says how many new tokens there are, for the error.
        bound: whose positions these are, for the error.
    """
    longest = max(samples, key=lambda sample: len(sample.prompt_ids))
    if len(longest.prompt_ids) + max_new_tokens > positions:
        raise GraftError(
            f"{setting}={max_new_tokens} after the {len(longest.prompt_ids)} tokens of prompt {longest.id} exceeds the "
            f"{bound} {positions} positions: ask for fewer"
        )


def parse_sample(line: bytes, place: str) -> Sample:
    """One line, checked; `place` names it in errors."""
    try:
        row = parse_json(line.decode("utf-8"))
    except ValueError as error:
        raise GraftError(f"{place} is not a JSON object: {error}") from error
    if not isinstance(row, dict) or row.keys() != FIELDS:
        raise GraftError(
            f"{place} is not a sample: its fields must be {', '.join(sorted(FIELDS))}; if an earlier version "
            "wrote it, run graft regenerate again"
        )
    if not isinstance(row["id"], str) or row["split"] not in SPLITS:
        raise GraftError(f"{place}: id must be a string and split one of {', '.join(SPLITS)}")
    if not _are_ids(row["ids"]):
        raise GraftError(f"{place}: ids of {row['id']} must be a list of token ids")
    sample = Sample(**row)
    if not _are_spans(sample.answers, len(sample.ids)):
        raise GraftError(
            f"{place}: answers of {sample.id} must be ascending pairs [start, end) within its {len(sample.ids)} tokens"
        )
    if not sample.prompt_ids:
        raise GraftError(f"{place}: the prompt of sample {sample.id} is empty")
    if sample.split == "train" and not sample.answers:
        raise GraftError(
            f"{place}: sample {sample.id} has no answer, so nothing to train on (an empty loss mask); "
            "remove it or generate it again"
        )
    return sample


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and 0 <= token < 2**31 for token in value)


def _are_spans(value: Any, length: int) -> bool:
    """Whether no span is empty, and each begins behind the one before: two that touch are one."""
    if not isinstance(value, list) or not all(_are_ids(span) and len(span) == 2 for span in value):
        return False
    ends = [-1, *(end for _, end in value)]
    return ends[-1] <= length and all(ends[n] < start < end for n, (start, end) in enumerate(value))

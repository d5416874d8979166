"""Samples: what `regenerate` writes and every later stage reads, one JSON object a line."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from graft_inference.errors import GraftError
from graft_train.data.documents import SPLITS


@dataclass(frozen=True)
class Sample:
    """A prompt and what the target itself answered; no answer outside the train split.

    Attributes:
        answer_ids: generated tokens, the end-of-sequence token included when it came.
        seed: of the batch in which the answer was drawn.
    """

    id: str
    split: str
    prompt_ids: list[int]
    answer_ids: list[int]
    temperature: float
    seed: int


FIELDS = {field.name for field in fields(Sample)}


def append_samples(file: BinaryIO, samples: Iterable[Sample]) -> None:
    """Appends in a single write that has reached the disk when this returns."""
    lines = "".join(json.dumps(asdict(sample), separators=(",", ":")) + "\n" for sample in samples)
    file.write(lines.encode())
    file.flush()
    os.fsync(file.fileno())


def read_samples(path: Path, split: str) -> list[Sample]:
    """The samples of one split, validated.

    Raises:
        GraftError: missing or empty file, a line that is no sample (numbered), a training sample whose
            answer, and so whose loss mask, is empty (named), or a split without samples.
    """
    if not path.is_file():
        raise GraftError(f"{path} does not exist; run recipes/regenerate.py first")
    with path.open("rb") as lines:
        samples = [parse_sample(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    if not samples:
        raise GraftError(f"{path} is empty; delete its directory and run recipes/regenerate.py again")
    chosen = [sample for sample in samples if sample.split == split]
    if not chosen:
        raise GraftError(f"{path} has no sample of the {split} split; run recipes/regenerate.py on more data")
    return chosen


def parse_sample(line: bytes, place: str) -> Sample:
    """One line, checked; `place` names it in errors."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise GraftError(f"{place} is not a JSON object: {error}") from error
    if not isinstance(row, dict) or row.keys() != FIELDS:
        raise GraftError(f"{place} is not a sample: its fields must be {', '.join(sorted(FIELDS))}")
    sample = Sample(**row)
    if not isinstance(sample.id, str) or sample.split not in SPLITS:
        raise GraftError(f"{place}: id must be a string and split one of {', '.join(SPLITS)}")
    if not _are_ids(sample.prompt_ids) or not _are_ids(sample.answer_ids):
        raise GraftError(f"{place}: prompt_ids and answer_ids of {sample.id} must be lists of token ids")
    if not sample.prompt_ids:
        raise GraftError(f"{place}: the prompt of sample {sample.id} is empty")
    if sample.split == "train" and not sample.answer_ids:
        raise GraftError(
            f"{place}: sample {sample.id} has no answer, so nothing to train on (an empty loss mask); "
            "remove it or generate it again"
        )
    return sample


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)

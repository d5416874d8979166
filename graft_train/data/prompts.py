"""Prompts: what the target is asked to continue or to answer; and conversations with answers of their own."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from graft_inference.errors import GraftError
from graft_train.config.data import DataConfig
from graft_train.data.bad_records import BadRecord, BadRecords
from graft_train.data.chat import Chat
from graft_train.data.documents import Document, Documents, document_settings
from graft_train.data.samples import Sample
from graft_train.processes import say

# A window's tokens are found within this many characters each; longer tokens are hardly ever that long.
CHARACTERS_PER_TOKEN = 16
T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """Attributes:
    place: where its document was read, for errors.
    """

    id: str
    ids: list[int]
    place: str = ""


def build_prompts(
    documents: Documents, chat: Chat, data: DataConfig, *, count: int, max_tokens: int, seed: int
) -> list[Prompt]:
    """Up to `count` prompts, spread over the documents in an order that only `seed` decides.

    Text gives windows of `data.prompt_tokens` tokens that start at a line's start and do not overlap;
    a conversation gives one prompt, the turns up to the last that asks for an answer.

    Args:
        max_tokens: longer conversations are cut at an earlier turn's end, and counted.

    Raises:
        GraftError: no prompt could be made, or a conversation meets a tokenizer without chat template.
    """
    cut = left_out = 0

    def fitting(document: Document) -> list[int]:
        nonlocal cut, left_out
        for shorter, ids in enumerate(chat.prompts(document)):
            if len(ids) <= max_tokens:
                cut += shorter > 0
                return ids
        left_out += 1
        return []

    def make(place: tuple[int, int]) -> list[Prompt]:
        document, start = documents[place[0]], place[1]
        if document.text is None:
            ids = fitting(document)
            usable = bool(ids)
        else:
            window = document.text[start : start + data.prompt_tokens * CHARACTERS_PER_TOKEN]
            ids = chat.opened(document, window, data.prompt_tokens)
            usable = data.prompt_tokens // 2 < len(ids) <= max_tokens
        return [Prompt(f"{document.id}@{start}", ids, document.place)] if usable else []

    starts = [(index, start) for index in range(len(documents)) for start in _starts(documents[index], data)]
    bad = BadRecords.of(data)
    prompts = list(islice(_mixed(starts, documents, data, seed, make, bad), count))
    bad.report(f"{len(documents)} documents")
    if cut or left_out:
        say(
            f"data: {cut + left_out} conversations ask with more than {max_tokens} tokens: {cut} were cut at "
            f"an earlier turn's end, {left_out} left out"
        )
    if not prompts:
        raise GraftError(
            f"none of {len(documents)} documents gives a prompt: texts are shorter than half of "
            f"data.prompt_tokens={data.prompt_tokens}, or prompts are longer than {max_tokens} tokens, which "
            "regenerate.max_prompt_tokens and the target's length allow; change these or the data"
        )
    return prompts


def room_for_prompts(positions: int, max_new_tokens: int, setting: str) -> int:
    """Tokens that a prompt may have where so many new ones are to fit behind it.

    Args:
        positions: most tokens of prompt and answer together.
        setting: says how many new tokens there are, for the error.

    Raises:
        GraftError: none.
    """
    if max_new_tokens >= positions:
        raise GraftError(
            f"{setting}={max_new_tokens} leaves no room for a prompt: prompt and answer together have at most "
            f"{positions} tokens, which the target's length or its server allows; lower it"
        )
    return positions - max_new_tokens


def prompt_settings(data: DataConfig) -> dict[str, Any]:
    """What determines the prompts beside the target, the documents included, for fingerprints."""
    return {
        "data": document_settings(data),
        "prompt_tokens": data.prompt_tokens,
        "chat_template_kwargs": data.chat_template_kwargs,
    }


def refuse_changed(data: DataConfig, recorded: dict[str, Any], out: Path) -> None:
    """Compares once more what `prompt_settings` recorded, or the record would tell of data that were not read.

    Args:
        out: what the stage has made of them so far.

    Raises:
        GraftError: files changed since.
    """
    if any(recorded[name] != value for name, value in prompt_settings(data).items()):
        raise GraftError(
            f"the files of data.path changed while they were read: delete {out} and run the same command again"
        )


def answered_samples(
    documents: Documents, chat: Chat, data: DataConfig, *, count: int, max_tokens: int, seed: int
) -> Iterator[Sample]:
    """Up to `count` training samples from the conversations' own answers, in the order of `build_prompts`.

    Args:
        max_tokens: longer conversations are cut at a turn's end, and counted.

    Raises:
        GraftError: no conversation has an answer, or, unless data.on_error=skip, one of them has none.
    """
    made, cut, bad = 0, 0, BadRecords.of(data)

    def make(place: tuple[int, int]) -> list[Sample]:
        nonlocal cut
        rows = chat.answered(documents[place[0]])
        whole = [row for row in rows if len(row.ids) <= max_tokens]
        cut += len(whole) < len(rows)
        shortened = rows[0].cut(max_tokens)
        return whole or ([shortened] if shortened else [])

    places = [(index, 0) for index in range(len(documents))]
    for sample in islice(_mixed(places, documents, data, seed, make, bad), count):
        made += 1
        yield sample
    bad.report(f"{len(documents)} documents")
    if cut:
        say(f"data: {cut} conversations are longer than {max_tokens} tokens and were cut at a turn's end")
    if not made:
        raise GraftError(f"none of {len(documents)} documents has an answer to train on within {max_tokens} tokens")


def _mixed(
    places: list[tuple[int, int]],
    documents: Documents,
    data: DataConfig,
    seed: int,
    make: Callable[[tuple[int, int]], list[T]],
    bad: BadRecords,
) -> Iterator[T]:
    """What `make` makes of the places, shuffled, and the sources in the proportion of their weights."""
    random.Random(seed).shuffle(places)

    def of_source(source: int) -> Iterator[T]:
        for place in places:
            if documents.places[place[0]].source == source:
                try:
                    yield from make(place)
                except BadRecord as error:
                    bad.add(error)

    weights = [source.weight for source in data.all_sources()]
    return in_proportion([of_source(source) for source in range(len(weights))], weights)


def in_proportion(streams: Sequence[Iterator[T]], weights: Sequence[float]) -> Iterator[T]:
    """Every item; while all last, as many of each stream as its weight says. Always the stream furthest behind."""
    taken, alive = [0] * len(streams), set(range(len(streams)))
    while alive:
        behind = min(alive, key=lambda stream: ((taken[stream] + 1) / weights[stream], stream))
        try:
            item = next(streams[behind])
        except StopIteration:
            alive.discard(behind)
            continue
        taken[behind] += 1
        yield item


def _starts(document: Document, data: DataConfig) -> Iterator[int]:
    """Where windows of a text start: line starts, far enough apart not to overlap. 0 for a conversation."""
    if document.text is None:
        yield 0
        return
    start, stride = 0, data.prompt_tokens * CHARACTERS_PER_TOKEN
    while start < len(document.text):
        yield start
        newline = document.text.find("\n", start + stride - 1)
        start = newline + 1 if newline >= 0 else len(document.text)

"""Documents: the text and conversations that prompts and training text are cut from.

A document belongs as a whole to one split, chosen by a hash of its id (without one, of what it asks), so nothing held
out is ever seen in training, whatever the order, the limit or the machine.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, overload

from tqdm import tqdm

from graft_inference.errors import GraftError
from graft_train.config.data import DataConfig, Source
from graft_train.data.bad_records import BadRecord, BadRecords
from graft_train.data.file_rows import Row
from graft_train.data.records import UNASKING, Content, Conversation, name_of, to_content
from graft_train.data.sources import files_of, is_local, rows_of

SPLITS = ("train", "calibration", "evaluation")


@dataclass(frozen=True)
class Document:
    """Plain text or a conversation; exactly one of the two.

    Attributes:
        source: which of the configured sources it comes from.
        place: where it was read, as errors name it: file and line, or data set and row.
    """

    id: str
    split: str
    source: int = 0
    text: str | None = None
    conversation: Conversation | None = None
    place: str = ""


class Place(NamedTuple):
    """Where a document lies: all that is held of it."""

    id: str
    split: str
    source: int
    place: str
    read: Callable[[], Any]


class Documents(Sequence[Document]):
    """Documents that are read from the disk when they are asked for, so that a set may exceed the memory."""

    def __init__(self, places: list[Place]) -> None:
        self.places = places
        self._last: Document | None = None

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> "Documents": ...

    def __getitem__(self, index: int | slice) -> "Document | Documents":
        if isinstance(index, slice):
            return Documents(self.places[index])
        identity, split, source, place, read = self.places[index]
        # A long text gives many prompts, one after the other.
        if self._last is None or self._last.id != identity:
            with _naming_unreadable():
                content = to_content(read(), place)
            if isinstance(content, str):
                self._last = Document(identity, split, source, text=content, place=place)
            else:
                self._last = Document(identity, split, source, conversation=content, place=place)
        return self._last


def read_documents(config: DataConfig) -> Documents:
    """All documents of every source, in its own order, each with its split. Every record is checked here.

    Raises:
        GraftError: unknown path, no document in it, or, unless data.on_error=skip, text that is not UTF-8
            or a record that cannot be read; names the file and the line.
    """
    places: list[Place] = []
    taken: dict[str, str] = {}
    for number, source in enumerate(config.all_sources()):
        with _naming_unreadable():
            found = _places(config, number, source, taken)
        if not found:
            earlier = " that an earlier source does not hold" if number else ""
            raise GraftError(
                f"data.path={source.path} holds no text{earlier}; check data.path and data.glob={config.glob}"
            )
        places += found
    return Documents(places)


def of_split(documents: Documents, split: str, config: DataConfig) -> Documents:
    """The documents of one split.

    Raises:
        GraftError: there is none, which a larger share or more documents would mend, or ids of their own.
    """
    chosen = [place for place in documents.places if place.split == split]
    if not chosen:
        raise GraftError(
            f"no document of {config} falls into the {split} split, where those with one id stay together; give more "
            "documents, or raise data.calibration_share or data.evaluation_share"
        )
    return Documents(chosen)


def split_of(identity: str, config: DataConfig) -> str:
    """The split of a document: a share of the hash space, so it never depends on other documents."""
    position = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") / 2**64
    if position < config.evaluation_share:
        return "evaluation"
    if position < config.evaluation_share + config.calibration_share:
        return "calibration"
    return "train"


def document_settings(config: DataConfig) -> dict[str, Any]:
    """What determines the documents and their splits, the files' contents included, for fingerprints."""
    digest = hashlib.sha256()
    for source in config.all_sources():
        if is_local(source.path):
            root, paths = files_of(source.path, config.glob)
            for path in paths:
                with _naming_unreadable(), path.open("rb") as file:
                    digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return {
        "sources": [asdict(source) for source in config.all_sources()],
        "hub_split": config.hub_split,
        "hub_subset": config.hub_subset,
        "streaming": config.streaming,
        "glob": config.glob,
        "calibration_share": config.calibration_share,
        "evaluation_share": config.evaluation_share,
        "limit": config.limit,
        "on_error": config.on_error,
        "contents": digest.hexdigest()[:16],
    }


@contextmanager
def _naming_unreadable() -> Iterator[None]:
    """Raises GraftError where a file cannot be read, such as one that has vanished since it was listed."""
    try:
        yield
    except OSError as error:
        raise GraftError(f"{error.filename} cannot be read: {error.strerror}; see whether it is still there") from error


def _places(config: DataConfig, number: int, source: Source, taken: dict[str, str]) -> list[Place]:
    """Every document of one source that is whole.

    Args:
        taken: the hash of what is behind each id of earlier sources; this one's are added.
    """
    bad, seen, places = BadRecords.of(config), 0, []
    streamed = config.limit if config.streaming else None
    rows = rows_of(source.path, config.glob, source.hub_split or config.hub_split, config.hub_subset, streamed)
    for row in tqdm(rows, desc=f"documents of {source.path}", unit="document", leave=False, delay=2):
        seen += 1
        try:
            place = _place(config, number, row, taken)
        except BadRecord as error:
            bad.add(error)
            continue
        if place is not None:
            places.append(place)
        if len(places) == config.limit:
            break
    bad.report(f"{seen} records of {source.path}")
    return places


def _place(config: DataConfig, source: int, row: Row, taken: dict[str, str]) -> Place | None:
    """None for an empty text file, and for a record that repeats another one."""
    record = row.now()
    if row.file and not record["text"].strip():
        return None
    content = to_content(record, row.place)
    hashed, given = _hash(content), name_of(record.get("id"))
    if given is None:
        identity, key = f"sha256:{hashed}", f"sha256:{_hash(_asked(content))}"
    else:
        # Sources number their records alike.
        identity, key = given if source == 0 else f"{source}:{given}", given
        if taken.get(identity, hashed) != hashed:
            # So do files, and some sets give one id to all that belongs together.
            identity = f"{identity}:{hashed}"
    if identity in taken:
        return None
    taken[identity] = hashed
    return Place(identity, split_of(key, config), source, row.place, row.later)


def _asked(content: Content) -> Content:
    """What tells documents without ids apart where they are divided: the answers to one question stay together."""
    if isinstance(content, str):
        return content
    last = max(turn for turn, message in enumerate(content.messages) if message["role"] not in UNASKING)
    return Conversation(content.messages[: last + 1])


def _hash(content: Content) -> str:
    """It does not depend on the order of keys, which a file's format may change."""
    plain = content if isinstance(content, str) else vars(content)
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]

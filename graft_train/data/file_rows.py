"""The rows of a file. What it holds is told by its content, see `kind_of`."""

import gzip
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from graft_inference.errors import GraftError
from graft_train.data.bad_records import BadRecord
from graft_train.data.strict_json import checked, parse

TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
"""The first bytes of a file that `datasets` reads, and the name of its builder; Arrow's are files and streams."""
POINTER = b"version https://git-lfs"
TABLE_SUFFIXES = (".parquet", ".arrow")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
UNREAD = {
    "csv": "is a CSV table, which does not say what its columns hold: convert it to JSONL or Parquet",
    "packed": "is compressed, and no JSON: unpack it",
    "pointer": "is a pointer of git-lfs, which stands for the file: fetch that with git lfs pull",
    "damaged": "is neither Parquet nor Arrow, whatever its name says: fetch or write it again",
    "binary": "is binary, and neither Parquet nor Arrow: convert it",
}
"""What no document is made of, and the remedy."""
HEAD = 4096
BLANK = re.compile(r"\s*")


@dataclass
class Row:
    """Where a record lies.

    Attributes:
        place: names it in errors: file and line, or data set and row.
        now: reads it while the source is being gone through; raises BadRecord if it is damaged.
        later: reads it again, from the disk: what is kept of a large set is only this.
        file: a whole text file, which may be empty and is then no document.
    """

    place: str
    now: Callable[[], Any]
    later: Callable[[], Any]
    file: bool = False


def kind_of(file: Path) -> str:
    """lines, array or object (JSON), parquet or arrow (tables), text, or one of `UNREAD`.

    The content tells it, but a name that promises JSON or a table is held to it, and CSV is known by its name alone.
    """
    with file.open("rb") as opened:
        head = opened.read(HEAD)
    for magic, builder in TABLES.items():
        if head.startswith(magic):
            return builder
    if head.startswith(POINTER):
        return "pointer"
    suffix = Path(file.name.removesuffix(".gz")).suffix.lower()
    if suffix in (".csv", ".tsv"):
        return "csv"
    if kind := _json_kind(file, suffix in JSON_SUFFIXES):
        return kind
    if _is_packed(file):
        return "packed"
    if suffix in TABLE_SUFFIXES:
        return "damaged"
    return "binary" if b"\0" in head else "text"


def rows_of_file(file: Path, kind: str, identity: str) -> Iterator[Row]:
    """Every row of a file, in its own order.

    Args:
        kind: as `kind_of` says.
        identity: the id of the document, if it is one of text.

    Raises:
        GraftError: a file that is damaged as a whole.
    """
    if kind == "lines":
        yield from _line_rows(file)
    elif kind == "array":
        yield from _array_rows(file)
    elif kind in TABLES.values():
        yield from table_rows(load_dataset(kind, data_files=str(file), split="train"), f"{file}, row")
    else:
        read = _read_object if kind == "object" else partial(_read_text, kind=kind, identity=identity)
        yield Row(str(file), partial(read, file), partial(read, file), file=kind == "text")


def table_rows(table: Any, place: str) -> Iterator[Row]:
    """The rows of a memory-mapped table."""
    for index, row in enumerate(readable(table, place)):
        named = f"{place} {index + 1}"
        yield Row(named, partial(checked, row, named), partial(table.__getitem__, index))


def readable(rows: Iterable[Any], place: str) -> Iterator[dict[str, Any]]:
    """Rows that `datasets` gives; whatever it raises on the way is a GraftError that names the place."""
    number = 1
    try:
        for row in rows:
            yield dict(row)
            number += 1
    except Exception as error:  # its errors share no base class
        raise GraftError(f"`datasets` cannot read {place} {number} or one close behind: {error}") from error


def load_dataset(path: str, **options: Any) -> Any:
    """`datasets.load_dataset`; whatever goes wrong there is a GraftError that names the set."""
    import datasets

    try:
        return datasets.load_dataset(path, **options)
    except Exception as error:  # its errors share no base class
        if file := options.get("data_files"):
            raise GraftError(f"`datasets` cannot read {file}: {error}") from error
        raise GraftError(
            f"{path} is no path here, and `datasets` cannot load it: {error}. Give a JSONL, JSON or Parquet file, a "
            "directory, a `datasets` id, or questions as data.path, and an existing data.hub_split"
        ) from error


def _json_kind(file: Path, named_so: bool) -> str | None:
    with _opened(file) as opened:
        head = opened.read(HEAD).removeprefix(BOM_UTF8).lstrip()
        if re.match(rb"\[" if named_so else rb'\[\s*(\{\s*["}]|\]\s*\Z)', head):
            return "array"
        if not re.match(rb'\{\s*["}]', head):
            return "lines" if named_so else None
        opened.seek(0)
        first, second = [*islice(filter(bytes.strip, opened), 2), b""][:2]
    try:
        json.loads(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        # An object over several lines, unless the next line begins one too.
        return "lines" if second.lstrip().startswith(b"{") else "object"
    return "lines"


def _is_packed(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(2) == b"\x1f\x8b"


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The content, unpacked."""
    try:
        with gzip.open(file) if _is_packed(file) else file.open("rb") as opened:
            yield opened  # type: ignore[misc]  # GzipFile has all that is asked of it
    except (OSError, EOFError, zlib.error) as error:
        raise GraftError(f"{file} cannot be read: {error}") from error


def _line_rows(file: Path) -> Iterator[Row]:
    """By our own reader: Arrow's wants one schema for all lines, and does not name the line that breaks it."""
    offset, packed = 0, _is_packed(file)
    with _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            yield _json_row(f"{file}, line {number}", line, None if packed else file, offset)
            offset += len(line)


def _array_rows(file: Path) -> Iterator[Row]:
    """The whole file is held while it is gone through."""
    offset, done, packed = 0, 0, _is_packed(file)
    with _opened(file) as opened:
        try:
            text = opened.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise GraftError(f"{file} is not UTF-8 (byte {error.start}); convert it") from error
    for number, (start, end) in enumerate(_elements(text, file), start=1):
        offset += len(text[done:start].encode())
        element = text[start:end].encode()
        yield _json_row(f"{file}, row {number}", element, None if packed else file, offset)
        offset, done = offset + len(element), end


def _elements(text: str, file: Path) -> Iterator[tuple[int, int]]:
    """[start, end) of each element of a JSON array."""
    scan, number = json.JSONDecoder().raw_decode, 0
    place = _next(text, text.index("[") + 1)
    while not text.startswith("]", place):
        number += 1
        try:
            _, end = scan(text, place)
        except (ValueError, RecursionError) as error:
            raise GraftError(f"{file}, row {number} is not JSON, nor is what follows: {error}") from error
        yield place, end
        place = _next(text, end)
        if text.startswith(",", place):
            place = _next(text, place + 1)
        elif not text.startswith("]", place):
            raise GraftError(f"{file}: neither a comma nor the array's end follows row {number}; mend the file")
    if _next(text, place + 1) < len(text):
        raise GraftError(f"{file}: something follows the array's end; give one array, or one JSON object a line")


def _next(text: str, place: int) -> int:
    match = BLANK.match(text, place)
    return match.end() if match else place


def _json_row(place: str, raw: bytes, file: Path | None, offset: int) -> Row:
    """Args:
    file: None keeps the bytes themselves: a compressed file has no places to go back to.
    """
    now = partial(_parse, raw, place)
    return Row(place, now, partial(_parse_at, file, offset, len(raw), place) if file else now)


def _parse_at(file: Path, offset: int, length: int, place: str) -> Any:
    with file.open("rb") as opened:
        opened.seek(offset)
        return _parse(opened.read(length), place)


def _parse(raw: bytes, place: str) -> Any:
    return parse(raw, place) if raw.strip() else None


def _read_object(file: Path) -> Any:
    with _opened(file) as opened:
        return parse(opened.read(), str(file))


def _read_text(file: Path, kind: str, identity: str) -> dict[str, str]:
    remedy = "or leave it out with data.glob, for example data.glob='**/*.py'"
    if kind in UNREAD:
        raise BadRecord(f"{file} {UNREAD[kind]}, {remedy}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord(f"{file} is not UTF-8 (byte {error.start}); convert it, {remedy}") from error
    if "\0" in text:
        raise BadRecord(f"{file} {UNREAD['binary']}, {remedy}")
    return {"id": identity, "text": text}

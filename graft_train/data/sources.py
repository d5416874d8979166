"""Sources: the files and data sets that records are read from, one row at a time."""

import json
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from graft_inference.errors import GraftError
from graft_train.data.bad_records import BadRecord

# Not program text: tests repeat themselves, charset tables and help topics are one literal per file.
STDLIB_LEFT_OUT = {
    "site-packages", "test", "tests", "idle_test", "lib2to3", "ensurepip", "encodings", "pydoc_data",
}  # fmt: skip


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


def rows_of(path: str, glob: str, hub_split: str, hub_subset: str | None, streamed: int | None) -> Iterator[Row]:
    """Every row of a source, in its own order.

    Args:
        streamed: read this many rows of a data set from the Hub without downloading all of it; None downloads.

    Raises:
        GraftError: an unknown path or an empty file.
    """
    if not is_local(path):
        yield from _hub_rows(path, hub_split, hub_subset, streamed)
        return
    root, paths = files_of(path, glob)
    for file in paths:
        if len(paths) == 1 and file.stat().st_size == 0:
            raise GraftError(f"{file} is empty; give a file with records or text")
        if file.suffix == ".jsonl":
            yield from _jsonl_rows(file)
        elif file.suffix == ".parquet" or (file.suffix == ".json" and len(paths) == 1):
            builder = "parquet" if file.suffix == ".parquet" else "json"
            yield from _table_rows(load_dataset(builder, data_files=str(file), split="train"), f"{file}, row")
        else:
            read = partial(_text_row, file, file.relative_to(root).as_posix())
            yield Row(str(file), read, read, file=True)


def is_local(path: str) -> bool:
    looks_like_file = path.startswith((".", "/", "~")) or Path(path).suffix in (".jsonl", ".parquet", ".json")
    return path == "stdlib" or looks_like_file or Path(path).exists()


def files_of(path: str, glob: str) -> tuple[Path, list[Path]]:
    """The directory that ids are relative to, and the files, sorted."""
    if path == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [file for file in root.rglob("*.py") if not STDLIB_LEFT_OUT & {*file.relative_to(root).parts}]
        # Build settings of this very interpreter, different on every machine.
        return root, sorted(file for file in paths if not file.name.startswith("_sysconfigdata"))
    root = Path(path).expanduser()
    if not root.exists():
        raise GraftError(
            f"data.path={path} does not exist; give a JSONL, JSON or Parquet file, a directory, a "
            "`datasets` id, or stdlib"
        )
    if root.is_file():
        return root.parent, [root]
    paths = [file for file in root.glob(glob) if file.is_file()]
    visible = [file for file in paths if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    return root, sorted(visible)


def _text_row(path: Path, identity: str) -> dict[str, str]:
    try:
        return {"id": identity, "text": path.read_text(encoding="utf-8")}
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"{path} is not UTF-8 (byte {error.start}); convert it, or leave it out with data.glob, "
            "for example data.glob='**/*.py'"
        ) from error


def _jsonl_rows(path: Path) -> Iterator[Row]:
    """By our own reader: Arrow's wants one schema for all lines, and does not name the line that breaks it."""
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            yield Row(place, partial(_parse, line, place), partial(_line_at, path, offset, place))
            offset += len(line)


def _line_at(path: Path, offset: int, place: str) -> Any:
    with path.open("rb") as file:
        file.seek(offset)
        return _parse(file.readline(), place)


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8")) if line.strip() else None
    except UnicodeDecodeError as error:
        raise BadRecord(f"{place} is not UTF-8; convert the file") from error
    except json.JSONDecodeError as error:
        raise BadRecord(f"{place} is not a JSON object: {error}") from error


def _hub_rows(path: str, split: str, subset: str | None, streamed: int | None) -> Iterator[Row]:
    place = f"data set {path}, row"
    if streamed is None:
        yield from _table_rows(load_dataset(path, name=subset, split=split), place)
        return
    stream = load_dataset(path, name=subset, split=split, streaming=True)
    for number, row in enumerate(islice(stream, streamed), start=1):
        read: Callable[[], Any] = partial(dict, row)
        yield Row(f"{place} {number}", read, read)


def _table_rows(table: Any, place: str) -> Iterator[Row]:
    """A memory-mapped table."""
    for index, row in enumerate(table):
        yield Row(f"{place} {index + 1}", partial(dict, row), partial(table.__getitem__, index))


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
            "directory, a `datasets` id, or stdlib as data.path, and an existing data.hub_split"
        ) from error

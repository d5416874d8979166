"""Sources: the files and data sets that records are read from, one row at a time."""

import re
import sysconfig
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from graft_inference.errors import GraftError
from graft_train.data.file_rows import (
    JSON_SUFFIXES,
    UNREAD,
    Row,
    kind_of,
    load_dataset,
    readable,
    rows_of_file,
    table_rows,
)
from graft_train.data.questions import questions
from graft_train.data.strict_json import checked

QUESTIONS = "questions"
"""The source that every machine has: questions about the functions of the standard library."""
# Nobody asks about tests, tools that come with Python, or what some versions lack.
LEFT_OUT = {
    "site-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3", "distutils", "ensurepip", "encodings",
    "pydoc_data",
}  # fmt: skip
# Missing files are known by these, for a better error.
FILE_SUFFIXES = (*JSON_SUFFIXES, ".parquet", ".arrow", ".gz", ".csv", ".txt")
# What `datasets` writes beside its tables.
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
CARD = re.compile(r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|code_of_conduct)(?![a-z])", re.I)
"""Names of text files that tell about the records beside them."""


def rows_of(path: str, glob: str, hub_split: str, hub_subset: str | None, streamed: int | None) -> Iterator[Row]:
    """Every row of a source, in its own order.

    Args:
        streamed: read this many rows of a data set from the Hub without downloading all of it; None downloads.

    Raises:
        GraftError: an unknown path, an empty or damaged file, or records mixed with text.
    """
    if not is_local(path):
        yield from _hub_rows(path, hub_split, hub_subset, streamed)
        return
    root, paths = files_of(path, glob)
    if path == QUESTIONS:
        yield from _asked_rows(root, paths)
        return
    for file, kind in _kinds(path, paths).items():
        yield from rows_of_file(file, kind, file.relative_to(root).as_posix())


def is_local(path: str) -> bool:
    looks_like_file = path.startswith((".", "/", "~")) or Path(path).suffix in FILE_SUFFIXES
    return path == QUESTIONS or looks_like_file or Path(path).exists()


def files_of(path: str, glob: str) -> tuple[Path, list[Path]]:
    """The directory that ids are relative to, and the files, sorted."""
    if path == QUESTIONS:
        root = Path(sysconfig.get_paths()["stdlib"])
        return root, sorted(file for file in root.rglob("*.py") if _is_asked_about(file.relative_to(root)))
    root = Path(path).expanduser()
    if not root.exists():
        raise GraftError(
            f"data.path={path} does not exist; give a JSONL, JSON or Parquet file, a directory, a "
            "`datasets` id, or questions"
        )
    if root.is_file():
        return root.parent, [_named(root)]
    paths = [file for file in root.glob(glob) if file.is_file()]
    visible = [file for file in paths if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    return root, sorted(map(_named, visible))


def _is_asked_about(name: Path) -> bool:
    """Whether a module of the standard library is anybody's business."""
    parts = [part for part in name.with_suffix("").parts if part != "__init__"]
    return not LEFT_OUT & {*parts} and not any(part.startswith("_") for part in parts)


def _asked_rows(root: Path, files: list[Path]) -> Iterator[Row]:
    """Questions about modules. Of functions that are documented alike only one is asked about: no split shows what
    another is measured by."""
    said = set[str]()
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        for record in questions(file, ".".join(part for part in parts if part != "__init__"), said):
            read = partial(dict[str, Any], record)
            yield Row(f"{file}, {record['id']}", read, read)


def _named(file: Path) -> Path:
    """The same; ids and errors are made of its name."""
    try:
        str(file).encode()
    except UnicodeEncodeError as error:
        raise GraftError(f"the name of the file {str(file)!a} is not UTF-8; rename it") from error
    return file


def _kinds(path: str, paths: list[Path]) -> dict[Path, str]:
    """What each file holds that documents are made of.

    Raises:
        GraftError: an empty file, or a directory that mixes records with text.
    """
    if len(paths) == 1 and paths[0].stat().st_size == 0:
        raise GraftError(f"{paths[0]} is empty; give a file with records or text")
    kinds = {file: kind_of(file) for file in paths if file.stat().st_size and file.name not in METADATA}
    texts = [file for file, kind in kinds.items() if kind == "text"]
    records = [file for file, kind in kinds.items() if kind not in ("text", *UNREAD)]
    if not records:
        return kinds
    for text in texts:
        if not CARD.match(text.name):
            globs = " or ".join(f"data.glob='**/*{file.suffix}'" for file in (records[0], text))
            raise GraftError(f"{path} holds records ({records[0]}) and text ({text}); choose one, for example {globs}")
    return {file: kind for file, kind in kinds.items() if file not in texts}


def _hub_rows(path: str, split: str, subset: str | None, streamed: int | None) -> Iterator[Row]:
    place = f"data set {path}, row"
    if streamed is None:
        yield from table_rows(load_dataset(path, name=subset, split=split), place)
        return
    stream = load_dataset(path, name=subset, split=split, streaming=True)
    for number, row in enumerate(readable(islice(stream, streamed), place), start=1):
        read = partial(checked, row, f"{place} {number}")
        yield Row(f"{place} {number}", read, read)

"""Documents: the text and conversations that prompts and training text are cut from.

A document belongs as a whole to one split, chosen by a hash of its id, so nothing held out is ever seen
in training, whatever the order, the limit or the machine.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft_inference.errors import GraftError

SPLITS = ("train", "calibration", "evaluation")
RECORD_FIELDS = ("text", "messages", "conversations")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# Not program text: tests repeat themselves, charset tables and help topics are one literal per file.
STDLIB_LEFT_OUT = {
    "site-packages", "test", "tests", "idle_test", "lib2to3", "ensurepip", "encodings", "pydoc_data",
}  # fmt: skip


@dataclass
class DataConfig:
    """Where documents come from and how they are divided.

    Attributes:
        path: "stdlib" (the Python standard library's sources), a JSONL or Parquet file of records, a
            directory of text files, or the id of a data set that `datasets` can load.
        hub_split: which split of a data set from the Hub is read.
        glob: which files of a directory are read.
        calibration_share: part of the documents kept for calibrating the policy.
        evaluation_share: part of the documents kept for the final measurement and the held-out loss.
        limit: read at most this many documents; null reads all.
        prompt_tokens: length of a prompt that is cut from plain text; conversations keep their own.
    """

    path: str = "stdlib"
    hub_split: str = "train"
    glob: str = "**/*"
    calibration_share: float = 0.05
    evaluation_share: float = 0.05
    limit: int | None = None
    prompt_tokens: int = 256

    def __post_init__(self) -> None:
        shares = self.calibration_share, self.evaluation_share
        if min(shares) < 0 or sum(shares) >= 1:
            raise GraftError(
                f"data.calibration_share={shares[0]} and data.evaluation_share={shares[1]} must not be "
                "negative and must leave some documents for training"
            )
        if self.limit is not None and self.limit < 1:
            raise GraftError(f"data.limit={self.limit} must be at least 1, or null for all documents")
        if self.prompt_tokens < 1:
            raise GraftError(f"data.prompt_tokens={self.prompt_tokens} must be at least 1")


@dataclass(frozen=True)
class Document:
    """Plain text, or a conversation as OpenAI messages ({"role", "content"}); exactly one of the two."""

    id: str
    split: str
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None


def read_documents(config: DataConfig) -> list[Document]:
    """All documents of `config.path`, in its own order, each with its split.

    Raises:
        GraftError: unknown path, no document in it, text that is not UTF-8, or a record without the
            expected fields; names the file and the line.
    """
    documents: list[Document] = []
    where_of: dict[str, str] = {}
    for where, identity, content in _contents(config):
        if identity in where_of:
            if identity.startswith("sha256:"):
                continue  # a repeated record: the hash of its content is its identity
            raise GraftError(f"{where} repeats the id {identity!r} of {where_of[identity]}; ids must be unique")
        where_of[identity] = where
        documents.append(_document(config, identity, content))
        if len(documents) == config.limit:
            break
    if not documents:
        raise GraftError(f"data.path={config.path} holds no text; check data.path and data.glob={config.glob}")
    return documents


def of_split(documents: Iterable[Document], split: str, config: DataConfig) -> list[Document]:
    """The documents of one split.

    Raises:
        GraftError: there is none, which a larger share or more documents would mend.
    """
    chosen = [document for document in documents if document.split == split]
    if not chosen:
        raise GraftError(
            f"no document of data.path={config.path} falls into the {split} split; give more documents, "
            "or raise data.calibration_share or data.evaluation_share"
        )
    return chosen


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
    if _is_local(config.path):
        root, paths = _files(config)
        for path in paths:
            digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return {
        "path": config.path,
        "hub_split": config.hub_split,
        "glob": config.glob,
        "calibration_share": config.calibration_share,
        "evaluation_share": config.evaluation_share,
        "limit": config.limit,
        "contents": digest.hexdigest()[:16],
    }


Content = str | tuple[dict[str, str], ...]


def _contents(config: DataConfig) -> Iterator[tuple[str, str, Content]]:
    """(where it was found, id, content) of every document that is not empty."""
    if not _is_local(config.path):
        yield from _records(_load_dataset(config.path, split=config.hub_split), f"data set {config.path}, row")
        return
    root, paths = _files(config)
    for path in paths:
        single = len(paths) == 1
        if single and path.stat().st_size == 0:
            raise GraftError(f"{path} is empty; give a file with records or text")
        if path.suffix == ".jsonl":
            yield from _records(_jsonl(path), f"{path}, line")
        elif path.suffix == ".parquet":
            rows = _load_dataset("parquet", data_files=str(path), split="train")
            yield from _records(rows, f"{path}, row")
        elif (text := _read_text(path)).strip():
            yield str(path), path.relative_to(root).as_posix(), text


def _is_local(path: str) -> bool:
    looks_like_file = path.startswith((".", "/", "~")) or Path(path).suffix in (".jsonl", ".parquet", ".json")
    return path == "stdlib" or looks_like_file or Path(path).exists()


def _files(config: DataConfig) -> tuple[Path, list[Path]]:
    """The directory that ids are relative to, and the files, sorted."""
    if config.path == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [path for path in root.rglob("*.py") if not STDLIB_LEFT_OUT & {*path.relative_to(root).parts}]
        # Build settings of this very interpreter, different on every machine.
        return root, sorted(path for path in paths if not path.name.startswith("_sysconfigdata"))
    root = Path(config.path).expanduser()
    if not root.exists():
        raise GraftError(
            f"data.path={config.path} does not exist; give a JSONL or Parquet file, a directory, a "
            "`datasets` id, or stdlib"
        )
    if root.is_file():
        return root.parent, [root]
    paths = [path for path in root.glob(config.glob) if path.is_file()]
    visible = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    return root, sorted(visible)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GraftError(
            f"{path} is not UTF-8 (byte {error.start}); convert it, or leave it out with data.glob, "
            "for example data.glob='**/*.py'"
        ) from error


def _jsonl(path: Path) -> Iterator[Any]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line.decode("utf-8")) if line.strip() else None
            except UnicodeDecodeError as error:
                raise GraftError(f"{path}, line {number} is not UTF-8; convert the file") from error
            except json.JSONDecodeError as error:
                raise GraftError(f"{path}, line {number} is not a JSON object: {error}") from error


def _load_dataset(name: str, **options: Any) -> Iterable[Any]:
    import datasets

    try:
        return datasets.load_dataset(name, **options)
    except Exception as error:  # its errors share no base class
        what = options.get("data_files", name)
        raise GraftError(
            f"`datasets` cannot load {what}: {error}. Give a JSONL or Parquet file, a directory, a "
            "`datasets` id, or stdlib as data.path, and an existing data.hub_split"
        ) from error


def _records(rows: Iterable[Any], where: str) -> Iterator[tuple[str, str, Content]]:
    """Validated records; blank lines and empty texts are passed over."""
    for number, row in enumerate(rows, start=1):
        if row is None:
            continue
        place = f"{where} {number}"
        if content := _record_content(row, place):
            yield place, _record_id(row, content), content


def _record_id(row: dict[str, Any], content: Content) -> str:
    if isinstance(row.get("id"), str | int):
        return str(row["id"])
    # The content's hash keeps a record that is repeated in the data within one split.
    return "sha256:" + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _record_content(row: Any, place: str) -> Content:
    if not isinstance(row, dict):
        raise GraftError(f"{place} is not a JSON object with one of the fields {', '.join(RECORD_FIELDS)}")
    field = next((name for name in RECORD_FIELDS if row.get(name) is not None), None)
    if field is None:
        raise GraftError(f"{place} has none of the fields {', '.join(RECORD_FIELDS)}; it has {sorted(row)}")
    if field == "text":
        if not isinstance(row["text"], str):
            raise GraftError(f"{place}: the field text must be a string")
        return row["text"] if row["text"].strip() else ""
    turns = row[field]
    if not isinstance(turns, list):
        raise GraftError(f"{place}: the field {field} must be a list of turns")
    role_key, content_key = ("role", "content") if field == "messages" else ("from", "value")
    messages = tuple(_message(turn, role_key, content_key, place) for turn in turns)
    if all(message["role"] in ("system", "assistant") for message in messages):
        raise GraftError(f"{place}: the conversation has no turn that the target could answer")
    return messages


def _message(turn: Any, role_key: str, content_key: str, place: str) -> dict[str, str]:
    if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in (role_key, content_key)):
        raise GraftError(f"{place}: every turn needs the strings {role_key} and {content_key}")
    role = turn[role_key]
    if role_key == "from":
        if role not in SHAREGPT_ROLES:
            raise GraftError(f"{place}: unknown speaker {role!r}; known are {sorted(SHAREGPT_ROLES)}")
        role = SHAREGPT_ROLES[role]
    return {"role": role, "content": turn[content_key]}


def _document(config: DataConfig, identity: str, content: Content) -> Document:
    split = split_of(identity, config)
    if isinstance(content, str):
        return Document(identity, split, text=content)
    return Document(identity, split, messages=content)

"""What a run directory holds, for those who read it: which stages are there, and what each has written."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft_inference.errors import GraftError
from graft_inference.files import parse_json, read_json
from graft_train.stage import RECIPE_OF, RECORD

STAGES = ("data", "head", "corpus", "policy", "bundle", "evaluation")
"""Directories of the stages, in the order in which they are made."""
PARTIAL = ".partial"


@dataclass(frozen=True)
class RunDirectory:
    """A run, which may be unfinished.

    Attributes:
        path: the run_dir of its stages.
    """

    path: Path

    @classmethod
    def open(cls, place: str | Path) -> "RunDirectory":
        """Raises GraftError where there is no directory, or none that a stage has worked in."""
        path = Path(place)
        if not path.is_dir():
            raise GraftError(f"there is no directory {path}: name the run_dir of a run, such as runs/quickstart")
        if (path / "graft.json").exists():
            raise GraftError(f"{path} is a bundle; name the run directory that it was made in (graft inspect shows it)")
        run = cls(path)
        if not run.found():
            raise GraftError(
                f"{path} is no run: it has none of {', '.join(STAGES)}; name the run_dir that graft's stages were given"
            )
        return run

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def found(self) -> list[Path]:
        """The stages' directories that are there, those that are not finished too."""
        names = [*STAGES[:-1], f"{STAGES[-1]}*"]
        paths = [path for name in names for end in ("", PARTIAL) for path in sorted(self.path.glob(f"{name}{end}"))]
        return [path for path in dict.fromkeys(paths) if (path / RECORD).is_file()]

    def evaluations(self) -> list[Path]:
        """The directories of all finished evaluations, that of the run's own prompts first."""
        return [path for path in self.found() if path.name.startswith(STAGES[-1]) and path.suffix != PARTIAL]

    def directory(self, name: str) -> Path:
        """Of a finished stage. Raises GraftError where it is missing; says whether it was begun."""
        path, recipe = self.path / name, f"graft {RECIPE_OF[name].partition(',')[0]}"
        if (path / RECORD).is_file():
            return path
        if path.with_name(f"{name}{PARTIAL}").is_dir():
            raise GraftError(
                f"{name} is not finished: {recipe} is at work on it, or was interrupted and goes on from it"
            )
        raise GraftError(f"{name} is missing: {recipe} makes it")

    def read(self, name: str, file: str) -> dict[str, Any]:
        """A JSON file of a finished stage. Raises GraftError where either is missing or damaged."""
        remedy = f"delete {self.path / name} and run graft {RECIPE_OF[name].partition(',')[0]}"
        return read_json(self.directory(name) / file, remedy)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines that training has logged so far, also of a head that is not finished.

        Raises:
            GraftError: there are none, or they are damaged; a last line that is not whole yet is left out.
        """
        paths = [self.path / name / "metrics.jsonl" for name in ("head", f"head{PARTIAL}")]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            self.directory("head")
            raise GraftError("this head was not trained here: graft adopt took it as it is")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        try:
            return [_object(line) for line in lines if line.endswith("\n")]
        except (ValueError, TypeError) as error:
            raise GraftError(
                f"{path} is damaged ({error}): it is written anew when graft distill runs again"
            ) from error


def _object(line: str) -> dict[str, Any]:
    values = parse_json(line)
    if not isinstance(values, dict):
        raise TypeError(f"{json.dumps(values)} is no object")
    return values

"""A run of every stage that nothing disturbed, to which disturbed ones are compared."""

import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft_train.config import Config
from graft_train.files import remove
from tests.graft_inference.tiny_bundle import write_target
from tests.graft_train.tiny_run import tiny_config, write_sources
from tests.recipes.test_road import STAGES

from .injected import Ran, contents, run

ALL = "GRAFT_ALL_FAULTS" in os.environ
"""Everything is met by every fault, in place of some that stand for them; `make faults` sets it."""
DIRECTORIES = ("data", "head", "corpus", "policy", "bundle", "evaluation")
MEMBERS = list(zip(STAGES, DIRECTORIES, strict=True))
SLOW = ("policy", "evaluation")
CHOSEN = [member for member in MEMBERS if ALL or member[1] not in SLOW]
"""The stages that the slower tests disturb."""
Stage = Callable[[Config], Path]


@dataclass
class Road:
    """Attributes:
    after: the run's files after each stage.
    operations: what each stage did.
    seconds: what each took when it was last run to its end.
    """

    config: Config
    after: dict[str, dict[str, bytes]] = field(default_factory=dict)
    operations: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def made(cls, directory: Path) -> "Road":
        write_sources(directory / "sources")
        config = tiny_config(directory / "run", directory / "sources")
        config.target.name_or_path = str(write_target(directory / "target"))
        config.head.max_steps, config.head.checkpoint_every = 3, 1
        road = cls(config)
        for stage, name in MEMBERS:
            ran = road.run(stage, name)
            assert ran.crashed is None is ran.refused, ran
            road.after[name], road.operations[name] = contents(road.run_dir), ran.operations
        return road

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    def run(self, stage: Stage, name: str, **disturbed: Any) -> Ran:
        started = time.monotonic()
        ran = run(stage, self.config, **disturbed)
        if not ran.killed:
            self.seconds[name] = time.monotonic() - started
        return ran

    def before(self, directory: str) -> dict[str, bytes]:
        """The files that the stage of a directory finds."""
        index = DIRECTORIES.index(directory)
        return self.after[DIRECTORIES[index - 1]] if index else {}

    def restore(self, files: dict[str, bytes]) -> None:
        if self.run_dir.is_mount():
            for path in self.run_dir.iterdir():
                remove(path)
        else:
            shutil.rmtree(self.run_dir, ignore_errors=True)
        for name, content in files.items():
            path = self.run_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def assert_resumes(self, stage: Stage, directory: str, after: object, **disturbed: Any) -> Ran:
        """The stage ends now, with the files of the run that nothing disturbed."""
        ran = self.run(stage, directory, **disturbed)
        assert ran.crashed is None is ran.refused, (after, ran)
        self.assert_same(directory, after)
        return ran

    def assert_same(self, directory: str, after: object) -> None:
        found, expected = contents(self.run_dir), self.after[directory]
        assert sorted(found) == sorted(expected), after
        assert [name for name in expected if found[name] != expected[name]] == [], after

    def assert_whole(self, directory: str, after: object) -> None:
        """What stands under its own name is whole: nothing else may be taken for finished work."""
        whole = [self.before(directory), self.after[directory]]  # an evaluation renews the bundle's card
        found = {name: content for name, content in contents(self.run_dir).items() if ".partial" not in name}
        assert [name for name in found if found[name] not in [files.get(name) for files in whole]] == [], after

    def assert_told(self, directory: str, ran: Ran, remedy: str) -> None:
        """In one line that names the path that could not be written."""
        assert ran.crashed is None, ran.crashed
        assert ran.refused is not None
        assert re.match(rf"(cannot save the checkpoint )?{self.run_dir}(:|/\.?({directory}|bundle)\b)", ran.refused)
        assert remedy in ran.refused.lower()
        assert "\n" not in ran.refused

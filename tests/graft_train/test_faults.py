"""Kills, crowding, full and read-only disks: a stage goes on to the same bits, or says in one line what is wrong."""

import errno
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from graft_inference.errors import GraftError
from graft_train.config import Config
from graft_train.files import only_one
from graft_train.regenerate import regenerate
from tests.graft_inference.tiny_bundle import write_target
from tests.graft_train.faults import FREEING, Ran, contents, kill, refuse, run
from tests.graft_train.tiny_run import tiny_config, write_sources
from tests.recipes.test_road import STAGES

ALL = "GRAFT_ALL_FAULTS" in os.environ
"""Every operation is met by every fault, in place of some that stand for them; takes half an hour."""
DIRECTORIES = ("data", "head", "corpus", "policy", "bundle", "evaluation")
MEMBERS = list(zip(STAGES, DIRECTORIES, strict=True))
SLOW = ("policy", "evaluation")
Stage = Callable[[Config], Path]


@dataclass
class Road:
    """A run of every stage that nothing disturbed.

    Attributes:
        after: the run's files after each stage.
        operations: what each stage did.
    """

    config: Config
    after: dict[str, dict[str, bytes]]
    operations: dict[str, list[str]]

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    def before(self, directory: str) -> dict[str, bytes]:
        """The files that the stage of a directory finds."""
        index = DIRECTORIES.index(directory)
        return self.after[DIRECTORIES[index - 1]] if index else {}

    def restore(self, files: dict[str, bytes]) -> None:
        shutil.rmtree(self.run_dir, ignore_errors=True)
        for name, content in files.items():
            path = self.run_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    directory = tmp_path_factory.mktemp("road")
    write_sources(directory / "sources")
    config = tiny_config(directory / "run", directory / "sources")
    config.target.name_or_path = str(write_target(directory / "target"))
    road = Road(config, {}, {})
    for stage, name in MEMBERS:
        ran = run(stage, config)
        assert ran.crashed is None is ran.refused, ran
        road.after[name], road.operations[name] = contents(road.run_dir), ran.operations
    return road


def chosen(count: int, few: int) -> list[int]:
    """Operations to try of so many: the first and last ones, and a few between."""
    if ALL:
        return list(range(count))
    between = random.Random(count).sample(range(count), min(few, count))
    return sorted({*range(min(few, count)), *between, *range(max(count - few, 0), count)})


def assert_resumes(road: Road, stage: Stage, directory: str, after: object) -> None:
    ran = run(stage, road.config)
    assert ran.crashed is None is ran.refused, (after, ran)
    found, expected = contents(road.run_dir), road.after[directory]
    assert sorted(found) == sorted(expected), after
    assert [name for name in expected if found[name] != expected[name]] == [], after


def assert_told(road: Road, directory: str, ran: Ran, remedy: str) -> None:
    """In one line that names the path that could not be written."""
    assert ran.crashed is None, ran.crashed
    assert ran.refused is not None
    assert re.match(rf"(cannot save the checkpoint )?{road.run_dir}(:|/\.?({directory}|bundle)\b)", ran.refused)
    assert remedy in ran.refused.lower()
    assert "\n" not in ran.refused


@pytest.mark.parametrize(("stage", "directory"), MEMBERS)
def test_a_stage_killed_before_any_file_operation_resumes_to_the_same_bits(road, stage, directory):
    operations = road.operations[directory]
    for number in chosen(len(operations), 1 if directory in SLOW else 3):
        road.restore(road.before(directory))
        assert run(stage, road.config, kill(number)).killed
        assert_resumes(road, stage, directory, operations[number])


@pytest.mark.parametrize(("stage", "directory"), MEMBERS)
def test_a_full_disk_is_told_in_one_line_and_the_stage_goes_on_once_there_is_room(road, stage, directory):
    operations = road.operations[directory]
    for number in chosen(len(operations), 1):
        road.restore(road.before(directory))
        ran = run(stage, road.config, refuse(number, errno.ENOSPC))
        if any(not operation.startswith(FREEING) for operation in operations[number:]):
            assert_told(road, directory, ran, "free some space")
        if ALL or number == len(operations) // 2:
            assert_resumes(road, stage, directory, operations[number])
    assert_resumes(road, stage, directory, operations[number])


@pytest.mark.parametrize("torn", [True, False])
@pytest.mark.parametrize(("stage", "directory"), MEMBERS)
def test_a_file_that_ends_in_the_middle_is_written_again(road, stage, directory, torn):
    """By a kill, or as the disk is full: of files written in Rust and C++, too, wherever they are whole at once."""
    new = road.after[directory].keys() - road.before(directory).keys()
    sizes = sorted(len(road.after[directory][name]) for name in new)
    for largest in {sizes[-1] - 1} if not ALL else {size - 1 for size in sizes} | {0}:
        road.restore(road.before(directory))
        ran = run(stage, road.config, largest=largest, torn=torn)
        if torn:
            assert ran.killed
        else:
            assert_told(road, directory, ran, "free some space")
        assert_resumes(road, stage, directory, largest)


@pytest.mark.parametrize(("stage", "directory"), MEMBERS)
def test_a_read_only_run_is_told_in_one_line(road, stage, directory):
    road.restore(road.before(directory))
    assert_told(road, directory, run(stage, road.config, refuse(0, errno.EROFS)), "give this user the right")


@pytest.mark.parametrize(("stage", "directory"), MEMBERS)
def test_a_finished_run_is_reused_without_writing_to_it(road, stage, directory):
    road.restore(road.after["evaluation"])
    ran = run(stage, road.config, refuse(0, errno.EROFS))
    assert ran.crashed is None is ran.refused
    assert ran.operations == []


@pytest.mark.parametrize(("stage", "directory"), MEMBERS)
def test_a_directory_that_another_process_is_at_work_on_is_left_alone(road, stage, directory):
    road.restore(road.before(directory))
    with only_one(road.run_dir / directory):
        with pytest.raises(
            GraftError, match=rf"{road.run_dir / directory} \(process {os.getpid()} on .*another run_dir"
        ):
            stage(road.config)
        assert contents(road.run_dir) == road.before(directory)
    assert_resumes(road, stage, directory, "waiting")


def test_no_answer_is_lost_to_a_second_process(road):
    """It begins when the first has opened the file of answers, and is refused."""
    road.restore(road.before("data"))
    said = road.run_dir.parent / "said"

    def crowd(number: int, event: str, path: str) -> None:
        if event == "open" and path.endswith("samples.jsonl") and not said.exists():
            said.touch()
            said.write_text(str(run(regenerate, road.config).refused))

    assert run(regenerate, road.config, crowd).refused is None
    assert re.search(r"another process is at work on .*/data \(process \d+ on ", said.read_text())
    assert contents(road.run_dir) == road.after["data"]

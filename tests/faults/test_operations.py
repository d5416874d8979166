"""Kills, crowding, full and read-only disks: a stage goes on to the same bits, or says in one line what is wrong."""

import errno
import os
import random
import re

import pytest

from graft_inference.errors import GraftError
from graft_train.files import only_one
from graft_train.regenerate import regenerate

from .injected import FREEING, contents, kill, refuse, run
from .road import ALL, MEMBERS, SLOW


def chosen(count: int, few: int) -> list[int]:
    """Operations to try of so many: the first and last ones, and a few between."""
    if ALL:
        return list(range(count))
    between = random.Random(count).sample(range(count), min(few, count))
    return sorted({*range(min(few, count)), *between, *range(max(count - few, 0), count)})


@pytest.mark.parametrize(("stage", "directory"), MEMBERS)
def test_a_stage_killed_before_any_file_operation_resumes_to_the_same_bits(road, tally, stage, directory):
    operations = road.operations[directory]
    for number in chosen(len(operations), 1 if directory in SLOW else 3):
        road.restore(road.before(directory))
        assert run(stage, road.config, kill(number)).killed
        road.assert_whole(directory, operations[number])
        road.assert_resumes(stage, directory, operations[number])
        tally("killed before a file operation", directory)


@pytest.mark.parametrize(("stage", "directory"), MEMBERS)
def test_a_full_disk_is_told_in_one_line_and_the_stage_goes_on_once_there_is_room(road, tally, stage, directory):
    operations = road.operations[directory]
    for number in chosen(len(operations), 1):
        road.restore(road.before(directory))
        ran = run(stage, road.config, refuse(number, errno.ENOSPC))
        if any(not operation.startswith(FREEING) for operation in operations[number:]):
            road.assert_told(directory, ran, "free some space")
            tally("disk full at a file operation", directory)
        if ALL or number == len(operations) // 2:
            road.assert_resumes(stage, directory, operations[number])
    road.assert_resumes(stage, directory, operations[number])


@pytest.mark.parametrize("torn", [True, False])
@pytest.mark.parametrize(("stage", "directory"), MEMBERS)
def test_a_file_that_ends_in_the_middle_is_written_again(road, tally, stage, directory, torn):
    """By a kill, or as the disk is full: of files written in Rust and C++, too, wherever they are whole at once."""
    new = road.after[directory].keys() - road.before(directory).keys()
    sizes = sorted(len(road.after[directory][name]) for name in new)
    for largest in {sizes[-1] - 1} if not ALL else {size - 1 for size in sizes} | {0}:
        road.restore(road.before(directory))
        ran = run(stage, road.config, largest=largest, torn=torn)
        if torn:
            assert ran.killed
        else:
            road.assert_told(directory, ran, "free some space")
        road.assert_resumes(stage, directory, largest)
        tally("killed in the middle of a file" if torn else "disk full in the middle of a file", directory)


@pytest.mark.parametrize(("stage", "directory"), MEMBERS)
def test_a_read_only_run_is_told_in_one_line(road, tally, stage, directory):
    road.restore(road.before(directory))
    road.assert_told(directory, run(stage, road.config, refuse(0, errno.EROFS)), "give this user the right")
    tally("read-only run", directory)


@pytest.mark.parametrize(("stage", "directory"), MEMBERS)
def test_a_finished_run_is_reused_without_writing_to_it(road, tally, stage, directory):
    road.restore(road.after["evaluation"])
    ran = run(stage, road.config, refuse(0, errno.EROFS))
    assert ran.crashed is None is ran.refused
    assert ran.operations == []
    tally("finished, read-only, run again", directory)


@pytest.mark.parametrize(("stage", "directory"), MEMBERS)
def test_a_directory_that_another_process_is_at_work_on_is_left_alone(road, tally, stage, directory):
    road.restore(road.before(directory))
    with only_one(road.run_dir / directory):
        with pytest.raises(
            GraftError, match=rf"{road.run_dir / directory} \(process {os.getpid()} on .*another run_dir"
        ):
            stage(road.config)
        assert contents(road.run_dir) == road.before(directory)
    road.assert_resumes(stage, directory, "waiting")
    tally("second process", directory)


def test_no_answer_is_lost_to_a_second_process(road, tally):
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
    tally("second process", "data")

"""What a run stands on: a disk that is really full or read-only, data that vanish, a clock that goes backwards."""

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from graft_train.files import remove

from .injected import contents, run
from .road import ALL, CHOSEN, MEMBERS

PAGE = 4096
IN_2038 = 2**31 - 1.0


@contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """A tmpfs on a directory, empty; the test is skipped where this user may not mount."""
    directory.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


def remount(directory: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", directory], check=True)


def used(directory: Path) -> int:
    stats = os.statvfs(directory)
    return (stats.f_blocks - stats.f_bfree) * stats.f_frsize


@pytest.mark.parametrize(("stage", "directory"), CHOSEN)
def test_a_disk_that_is_really_full_is_told_and_the_stage_goes_on_once_it_is_larger(road, tally, stage, directory):
    """Writes of every library meet it, whatever they are written in."""
    with small_disk(road.run_dir):
        road.restore(road.after[directory])
        whole = used(road.run_dir)
        road.restore(road.before(directory))
        before = used(road.run_dir)
        for share in [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98] if ALL else [0.5]:
            road.restore(road.before(directory))
            room = max(PAGE, PAGE * int((before + share * (whole - before)) // PAGE))
            remount(road.run_dir, f"size={room}")
            ran = run(stage, road.config)
            road.assert_told(directory, ran, "free some space")
            tally("tmpfs full", directory)
            remount(road.run_dir, f"size={64 << 20}")
            road.assert_resumes(stage, directory, share)


@pytest.mark.parametrize(("stage", "directory"), MEMBERS)
def test_a_disk_that_is_really_read_only_is_told(road, tally, stage, directory):
    with small_disk(road.run_dir):
        road.restore(road.before(directory))
        remount(road.run_dir, "ro")
        try:
            road.assert_told(directory, run(stage, road.config), "give this user the right")
        finally:
            remount(road.run_dir, "rw")
        tally("tmpfs read-only", directory)


@pytest.mark.parametrize(("stage", "directory"), CHOSEN)
def test_a_file_that_has_vanished_is_told_by_name_or_not_needed(road, tally, stage, directory):
    """Of what the stages before have made. Once it is back, the stage makes what it would have made."""
    names = sorted(name for name in road.before(directory) if not name.startswith("bundle/custom_generate"))
    for name in names if ALL else random.Random(0).sample(names, min(1, len(names))):
        road.restore(road.before(directory))
        remove(road.run_dir / name)
        ran = run(stage, road.config)
        assert ran.crashed is None, (name, ran.crashed)
        if ran.refused is None:
            expected = {found: content for found, content in road.after[directory].items() if found != name}
            found = {one: content for one, content in contents(road.run_dir).items() if one != name}
            assert found == expected, name
        else:
            assert str(Path(name).parent) in ran.refused, (name, ran.refused)
            assert "\n" not in ran.refused
        tally("input vanished", directory)
        (road.run_dir / name).write_bytes(road.before(directory)[name])
        road.assert_resumes(stage, directory, name)


@pytest.mark.parametrize("when", ["before", "listed", "read"])
def test_data_that_have_vanished_are_told_by_name(road, tally, when):
    """All of them before it begins; a file that is listed and not yet read; one that was read for the record alone."""
    stage, directory = MEMBERS[0]
    sources = Path(road.config.data.path)
    first, last = sources / "file0.py", sources / "file9.py"
    gone = sources if when == "before" else last
    aside = sources.with_name("aside")
    road.restore({})

    def vanish_when_the_first_is_read(event: str, arguments: tuple) -> None:
        if event == "open" and arguments[0] == str(first) and gone.exists():
            gone.rename(aside)

    def vanish(number: int, event: str, path: str) -> None:
        if number == 0 and when == "read":
            gone.rename(aside)
        elif number == 0:
            sys.addaudithook(vanish_when_the_first_is_read)

    if when == "before":
        gone.rename(aside)
    ran = run(stage, road.config, None if when == "before" else vanish)
    aside.rename(gone)
    assert ran.crashed is None is not ran.refused, ran
    assert ("files of data.path changed" if when == "read" else str(gone)) in ran.refused
    if when == "read":
        remove(road.run_dir / "data.partial")
    road.assert_resumes(stage, directory, when)
    tally("data vanished", directory)


@pytest.mark.parametrize(("stage", "directory"), CHOSEN)
def test_a_clock_that_goes_backwards_changes_nothing(road, tally, stage, directory):
    """The time of day falls with every look at it; what a kill left, and all before, is from the future."""
    road.restore(road.before(directory))
    run(stage, road.config, kill_after=road.seconds[directory] / 2, backwards=True)
    for path in road.run_dir.rglob("*"):
        os.utime(path, (IN_2038, IN_2038))
    road.assert_resumes(stage, directory, "2038", backwards=True)
    tally("clock backwards", directory)


@pytest.mark.parametrize(("stage", "directory"), CHOSEN)
def test_a_second_process_is_refused_until_the_first_is_dead(road, tally, stage, directory):
    """It comes in the midst of the first one's work. A dead process holds no lock, though its file is there."""
    road.restore(road.before(directory))
    said = road.run_dir.parent / "said"
    middle = len(road.operations[directory]) // 2

    def crowd_and_die(number: int, event: str, path: str) -> None:
        if number == middle:
            said.write_text(str(run(stage, road.config).refused))
            os.kill(os.getpid(), signal.SIGKILL)

    assert run(stage, road.config, crowd_and_die).killed
    assert re.match(rf"another process is at work on {road.run_dir / directory} \(process \d+ on ", said.read_text())
    assert (road.run_dir / f".{directory}.lock").exists()
    road.assert_resumes(stage, directory, "dead")
    tally("second process, then the first dies", directory)

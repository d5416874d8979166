"""Damages inputs at random and uses them, in a process of its own that may crash, hang or take memory.

Every seed is one mutation, of a kind that follows from the seed: whatever went wrong comes back with it.
"""

import multiprocessing
import os
import random
import resource
import signal
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

import psutil
import torch

from graft_inference.errors import GraftError

from .subject import Subject

SECONDS, PATIENCE = 60, 5
"""Within which one is used, of a processor's time; and how many times as long it may take on a busy machine."""
SLACK_BYTES = 64 << 20
"""Beyond twice the file and what a sound one takes: an allocator's pieces, and another mutation's rubbish."""
ROOM_BYTES = 4 << 30
"""Of address space beyond what the process had: what runs away does not take the machine with it."""
FINE = ("right", "refused")
OUT_OF_MEMORY = ("allocate", "MemoryError", "bad_alloc", "out of memory")


@dataclass
class Found:
    """What became of one mutation: "right", "refused", or what went wrong; and what it was."""

    seed: int
    kind: str
    outcome: str
    damage: str


class Fuzz:
    """Uses damaged inputs of every kind.

    Args:
        subjects: by name.
    """

    def __init__(self, subjects: dict[str, Subject]) -> None:
        self.subjects = subjects
        self.peaks: dict[str, int] = {}

    def seeds(self, first: int, count: int) -> list[tuple[int, str]]:
        """Of so many seeds from this one on those whose kind is asked for, each with it."""
        kinds = ((seed, kind_of(seed)) for seed in range(first, first + count))
        return [(seed, kind) for seed, kind in kinds if kind in self.subjects]

    def run(self, seeds: Iterable[tuple[int, str]]) -> Iterator[Found]:
        """Uses them one after the other; whoever crashes or hangs is told, and another process goes on behind it."""
        left = list(seeds)
        while left:
            for found in self._in_one_process(list(left)):
                left.pop(0)
                yield found

    def _in_one_process(self, seeds: list[tuple[int, str]]) -> Iterator[Found]:
        context = multiprocessing.get_context("fork")
        reading, writing = context.Pipe(duplex=False)
        process = context.Process(target=self._work, args=(seeds, writing))
        process.start()
        watched = psutil.Process(process.pid)
        writing.close()
        for seed, kind in seeds:
            outcome, damage, goes_on = "", "none yet: sound ones are used first", False
            try:
                damage = _next(reading, watched, 5 * SECONDS)
                outcome, goes_on = _next(reading, watched, SECONDS), True
            except TimeoutError:
                process.kill()
                outcome = f"no end within {SECONDS} s"
            except EOFError:
                process.join()
                outcome = f"the process died: {process.exitcode}"
            yield Found(seed, kind, outcome, damage)
            if not goes_on:
                break
        process.join()
        reading.close()

    def _work(self, seeds: list[tuple[int, str]], pipe: Connection) -> None:
        _bound_memory()
        told = _silenced()
        try:
            self._use_all(seeds, pipe)
        except BaseException:  # of this program, not of what it uses
            traceback.print_exc(file=told)
            told.flush()
            os._exit(1)
        os._exit(0)

    def _use_all(self, seeds: list[tuple[int, str]], pipe: Connection) -> None:
        known = set[str]()
        for seed, kind in seeds:
            subject = self.subjects[kind]
            if kind not in known:
                subject.open()
                self.peaks[kind] = self._sound_peak(kind, subject)
                known.add(kind)
            pipe.send(subject.damage(random.Random(seed)))
            outcome, peak = measured(subject)
            if outcome in FINE and peak > self.peaks[kind] + 2 * subject.size + SLACK_BYTES:
                outcome = f"{peak >> 20} MiB, where sound ones take {self.peaks[kind] >> 20} MiB"
            pipe.send(outcome)

    def _sound_peak(self, kind: str, subject: Subject) -> int:
        """The most bytes that sound inputs take, the second time; each of them must be right."""
        number, most = 0, 0
        while subject.restore(number):
            measured(subject)
            outcome, peak = measured(subject)
            assert outcome == "right", f"a sound {kind} ({number}) is not: {outcome}"
            number, most = number + 1, max(most, peak)
        return most


def kind_of(seed: int) -> str:
    """Every seed has a kind, whichever are asked for."""
    from .kinds import SCHEDULE

    return SCHEDULE[seed % len(SCHEDULE)]


def measured(subject: Subject) -> tuple[str, int]:
    """What became of using it, and the bytes that it took beyond what was held before."""
    outcome = "right"

    def use() -> None:
        nonlocal outcome
        try:
            outcome = subject.use()
        except GraftError as error:
            said = str(error)
            outcome = "refused" if said.strip() else "an error without a word"
            if any(word in said for word in OUT_OF_MEMORY):
                outcome = f"refused only by the memory's end: {said}"
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"

    peak = _peak(use)
    return outcome, peak


def _peak(work: Callable[[], object]) -> int:
    """Bytes that the process takes at most beyond what it held before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def _bound_memory() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    most = _status("VmSize") + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _silenced() -> TextIO:
    """Nothing that is said on stdout and stderr is seen from now on; returns what stderr was."""
    told = os.fdopen(os.dup(2), "w")
    with open(os.devnull, "w") as nothing:
        for stream in (1, 2):
            os.dup2(nothing.fileno(), stream)
    return told


def _next(pipe: Connection, process: psutil.Process, seconds: float) -> str:
    """Raises TimeoutError where the process has worked so long, or waited many times as long, and says nothing."""
    begun, worked = time.monotonic(), _worked(process)
    while not pipe.poll(0.1 * seconds):
        if _worked(process) - worked > seconds or time.monotonic() - begun > PATIENCE * seconds:
            raise TimeoutError
    return str(pipe.recv())


def _worked(process: psutil.Process) -> float:
    """Seconds of a processor, however many others want it."""
    with suppress(psutil.Error):
        times = process.cpu_times()
        return times.user + times.system
    return 0.0


def table(found: dict[str, Counter[str]]) -> str:
    """Counts by kind, for people."""
    lines = [f"{'kind':14}{'mutations':>10}{'right':>8}{'refused':>9}{'faults':>8}"]
    for kind, counts in {**found, "all": sum(found.values(), Counter[str]())}.items():
        columns = counts.total(), counts["right"], counts["refused"], counts["fault"]
        lines.append(f"{kind:14}{columns[0]:>10}{columns[1]:>8}{columns[2]:>9}{columns[3]:>8}")
    return "\n".join(lines)


def tell(fuzz: Fuzz, first: int, count: int) -> int:
    """Uses as many mutations, and prints every fault as it comes and what became of all; how many were faults."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for number, found in enumerate(fuzz.run(fuzz.seeds(first, count)), start=1):
        fine = found.outcome in FINE
        counts[found.kind][found.outcome if fine else "fault"] += 1
        if not fine:
            print(f"seed {found.seed}, {found.kind}: {found.outcome[:600]}\n    {found.damage}", flush=True)
        if number % 500 == 0:
            print(f"up to seed {found.seed}; go on with --seed {found.seed + 1}\n{table(counts)}", flush=True)
    print(f"seeds {first} to {first + count - 1}\n{table(dict(sorted(counts.items())))}", flush=True)
    return sum(one["fault"] for one in counts.values())

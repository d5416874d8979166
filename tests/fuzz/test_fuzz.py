"""A few of the mutations of `make fuzz`, of every kind."""

import os
import re
import signal
import time

import pytest

from graft_inference import GraftError

from . import driver
from .driver import FINE, Fuzz, kind_of
from .kinds import KINDS, SCHEDULE

MUTATIONS = 8 * len(SCHEDULE)


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    return Fuzz({name: kind(root / name) for name, kind in KINDS.items()})


def test_what_is_damaged_is_right_or_refused(fuzz):
    found = list(fuzz.run(fuzz.seeds(0, MUTATIONS)))
    assert [one for one in found if one.outcome not in FINE] == []
    assert len(found) == MUTATIONS
    for name in KINDS:
        assert {one.outcome for one in found if one.kind == name} <= set(FINE)
    assert {one.outcome for one in found} == set(FINE)


class Faulty:
    """Inputs that are wrong, take too much, raise something else or crash, by turns; and one that is refused for no
    reason that the user could read."""

    def __init__(self, use):
        self.use, self.size = use, 0

    def open(self):
        pass

    def damage(self, rng):
        return "some damage"

    def restore(self, number):
        return False


def take(count):
    return "right" if len(b"x" * count) == count else "less"


def raises(error):
    raise error


@pytest.mark.parametrize(
    ("use", "told"),
    [
        (lambda: "wrong tokens", "wrong tokens"),
        (lambda: raises(KeyError("a")), "KeyError: 'a'"),
        (lambda: raises(GraftError(" ")), "an error without a word"),
        (lambda: raises(GraftError("torch cannot allocate")), "refused only by the memory's end"),
        (lambda: take(200 << 20), r"\d+ MiB, where sound ones take 0 MiB"),
        (lambda: take(8 << 30), "MemoryError"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "the process died: -9"),
        (lambda: time.sleep(9), "no end within"),
    ],
    ids=["wrong", "exception", "empty", "no memory left", "memory", "all memory", "crash", "hang"],
)
def test_every_fault_is_told_and_the_rest_goes_on(use, told, monkeypatch):
    monkeypatch.setattr(driver, "SECONDS", 1)
    name = kind_of(0)
    [first, *others] = Fuzz({name: Faulty(use)}).run([(0, name), (1, name)])
    assert re.match(told, first.outcome), first.outcome
    assert [one.seed for one in others] == [1]

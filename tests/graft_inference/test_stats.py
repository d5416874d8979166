"""Phases of a round on a GPU are timed by moments that the device reaches later: nothing waits but the end."""

import pytest
import torch

from graft_inference.stats import PHASES, PhaseClock


class Device:
    """Reaches moments in order, when it is told to."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self.reached = self.waits = 0

    def moment(self, milliseconds: float) -> "Moment":
        self.moments.append(Moment(self, len(self.moments), milliseconds))
        return self.moments[-1]


class Moment:
    def __init__(self, device, place, milliseconds) -> None:
        self.device, self.place, self.milliseconds = device, place, milliseconds

    def query(self) -> bool:
        return self.place < self.device.reached

    def synchronize(self) -> None:
        self.device.waits += 1
        self.device.reached = max(self.device.reached, self.place + 1)

    def elapsed_time(self, later) -> float:
        assert self.query(), "this moment has not been reached"
        assert later.query(), "the later moment has not been reached"
        return later.milliseconds - self.milliseconds


def test_phases_are_added_once_the_device_has_reached_them(monkeypatch):
    device, times = Device(), iter([0.0, 5.0, 100.0, 102.0, 109.0, 200.0, 201.0])
    monkeypatch.setattr(PhaseClock, "_moment", lambda clock: device.moment(next(times)))
    seconds = dict.fromkeys(PHASES, 0.0)
    clock = PhaseClock(seconds, torch.device("cuda"))
    clock.mark("prefill")
    clock.start()  # at 100: what lies between two rounds is the caller's
    clock.mark("draft")
    clock.mark("verify")
    assert not any(seconds.values())
    device.reached = 4
    clock.start()
    assert seconds == dict.fromkeys(PHASES, 0.0) | {"prefill": 0.005, "draft": pytest.approx(0.002)}
    clock.mark("draft")
    assert device.waits == 0
    clock.settle()
    assert device.waits == 1
    expected = {"prefill": 0.005, "draft": 0.003, "verify": 0.007}
    assert seconds == pytest.approx(dict.fromkeys(PHASES, 0.0) | expected)
    clock.settle()
    assert device.waits == 1

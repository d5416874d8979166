"""CUDA graphs without CUDA: records the operators that a function runs, and runs them again on the same memory.

As in a graph, whatever was a number in Python while recording stays that number; nothing may be read on the host; and
what a replay leaves in memory of its own is lost, as if another graph had used it since.
"""

import time
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graft_inference.decode.cuda_graph import CannotCapture, Captured, undone, waits


class Recording(TorchDispatchMode):
    """What ran: operators with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if waits(name, args):
            raise CannotCapture(f"{name} waits for the device")
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


def refuse(tensor, *args, **kwargs):
    raise CannotCapture("tolist waits for the device")


class RecordedGraphs:
    """Takes the place of `CudaGraphs`.

    Attributes:
        reads: how often the host waited.
        captures, replays: how many.
    """

    def __init__(self) -> None:
        self.reads = self.captures = self.replays = 0
        self._hidden = None

    def capture(self, function, changing) -> Captured:
        with undone(changing):
            outputs = [tensor.clone() for tensor in function()]
        with (
            undone(changing),
            mock.patch.object(Tensor, "tolist", refuse),
            mock.patch.object(Tensor, "numpy", refuse),
            Recording() as recording,
        ):
            for kept, tensor in zip(outputs, function(), strict=True):
                kept.copy_(tensor)
        assert self._hidden is None, "what was computed aside is never joined"
        self.captures += 1
        steps, own = _steps(recording.calls)
        _spoil(own)

        def replay() -> None:
            self.replays += 1
            for func, args, kwargs, results in steps:
                fresh = func(*args, **kwargs)
                for old, new in zip(results, tree_leaves(fresh) if results else (), strict=True):
                    old.copy_(new)
            _spoil(own)

        return Captured(replay, outputs)

    @contextmanager
    def aside(self):
        """What is computed here may not be read before `join`: until then other values stand there."""
        assert self._hidden is None, "two blocks aside, and no join between them"
        with Recording() as recording:
            yield
        _, own = _steps(recording.calls)
        self._hidden = [(tensor, tensor.clone()) for tensor in own]
        _spoil(own)

    def join(self) -> None:
        assert self._hidden is not None, "nothing is aside"
        for tensor, value in self._hidden:
            tensor.copy_(value)
        self._hidden = None

    def host(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.long)

    def wait(self) -> None:
        self.reads += 1

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


def _steps(calls: list) -> tuple[list, list[Tensor]]:
    """What a replay runs, with the tensors that take the results; and all memory that the recording allocated."""
    steps, own, seen = [], [], set()
    for func, args, kwargs, result in calls:
        inputs = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func._schema.is_mutable:
            steps.append((func, args, kwargs, []))
        elif not all(_address(leaf) in inputs for leaf in results):  # a view needs no second run
            steps.append((func, args, kwargs, results))
            fresh = [leaf for leaf in results if _address(leaf) not in inputs | seen]
            own += fresh
            seen |= {_address(leaf) for leaf in fresh}
    return steps, own


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _spoil(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.fill_(float("nan") if tensor.is_floating_point() else tensor.dtype == torch.bool or 77)

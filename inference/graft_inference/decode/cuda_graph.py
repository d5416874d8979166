"""Functions of tensors at fixed addresses, captured into CUDA graphs and replayed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..device import event

Function = Callable[[], Sequence[Tensor]]
READS = {"item", "is_nonzero", "_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "_unique2"}
"""Operators whose result, or its size, the host has to know."""
MASKS = (torch.bool, torch.uint8)
COPIES = ("copy_", "_to_copy")


class CannotCapture(Exception):
    """The function waits for the device somewhere, or there is no memory for its graph."""


@dataclass
class Captured:
    """A captured function.

    Attributes:
        replay: runs it again on what its inputs hold now.
        outputs: what it returned last, at addresses that stay and that no other graph writes to.
    """

    replay: Callable[[], None]
    outputs: list[Tensor]


class CudaGraphs:
    """Captures and replays on one device. All graphs share a memory pool, so one may overwrite another's results."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._side = torch.cuda.Stream(device)
        self._kept: list[torch.cuda.CUDAGraph] = []
        self._open_pool()

    def _open_pool(self) -> None:
        """The pool dies with the last of its graphs, and a capture into a dead one fails: its first graph stays."""
        self._pool = torch.cuda.graph_pool_handle()
        self._kept.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(self._kept[-1], self._pool, self._stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=self.device)

    def capture(self, function: Function, changing: Sequence[Tensor]) -> Captured:
        """Runs the function twice, without lasting effect, and records a third run.

        Args:
            changing: what the function changes and must find unchanged.

        Raises:
            CannotCapture: it reads something on the host, or there is no memory.
        """
        outputs = self._warm_up(function, changing)
        graph = torch.cuda.CUDAGraph()
        try:
            # Should the capture not even begin, torch would leave its stream the current one.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                for kept, tensor in zip(outputs, function(), strict=True):
                    kept.copy_(tensor)
        except RuntimeError as error:
            # The allocator goes on recording into the pool of a capture that broke off: the next takes another.
            self._kept.append(graph)
            self._open_pool()
            raise CannotCapture(str(error).partition("\n")[0]) from error
        return Captured(graph.replay, outputs)

    def _warm_up(self, function: Function, changing: Sequence[Tensor]) -> list[Tensor]:
        """Runs the function twice, the second time watched; room for what it returns."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                with undone(changing):
                    outputs = [tensor.clone() for tensor in function()]
                with undone(changing), NoHostReads():
                    function()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise CannotCapture(str(error).partition("\n")[0]) from error
        finally:
            current.wait_stream(self._stream)
        return outputs

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What runs inside may overlap with what follows, up to `join`."""
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self._side)

    def host(self, size: int) -> Tensor:
        """Host memory that a graph may write to, [size] int64."""
        return torch.zeros(size, dtype=torch.long, pin_memory=True)

    def wait(self) -> None:
        """Returns once everything replayed so far has been done."""
        torch.cuda.current_stream(self.device).synchronize()

    def now(self) -> torch.cuda.Event:
        return event(self.device)

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Between two moments that lie before the last `wait`."""
        return start.elapsed_time(end) / 1e3


class KeptGraphs:
    """Graphs by what they are of, each captured when it is first asked for.

    Attributes:
        captures: graphs captured so far, failed attempts included.
    """

    def __init__(self, graphs: CudaGraphs) -> None:
        self.graphs = graphs
        self.captures = 0
        self._captured: dict[tuple, tuple[Captured, Any]] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def clear(self) -> None:
        self._captured.clear()

    def run(self, key: tuple, function: Callable[[], Any], given: Any, changing: Callable[[], Sequence[Tensor]]) -> Any:
        """Replays a function, captured first where it was not yet; returns what it returned, where its graph writes it.

        Args:
            given: lists and dataclasses of tensors; where the function hands one of these on, nothing is copied.
            changing: what it changes for good, see `CudaGraphs.capture`.

        Raises:
            CannotCapture: see there.
        """
        if key not in self._captured:
            self.captures += 1
            self._captured[key] = self._capture(function, given, changing())
        captured, returned = self._captured[key]
        captured.replay()
        return returned

    def _capture(self, function: Callable[[], Any], given: Any, changing: Sequence[Tensor]) -> tuple[Captured, Any]:
        """A graph, and what its function returns at the addresses that replays write to."""
        known: dict[int, Tensor] = {}
        changed(given, lambda one: known.setdefault(id(one), one))
        last: list[Any] = []

        def outputs() -> list[Tensor]:
            found: list[Tensor] = []
            last[:] = [function()]
            changed(last[0], lambda one: one if id(one) in known else _put(found, one))
            return found

        captured = self.graphs.capture(outputs, changing)
        kept = iter(captured.outputs)
        return captured, changed(last.pop(), lambda one: one if id(one) in known else next(kept))


def _put(found: list[Tensor], one: Tensor) -> Tensor:
    found.append(one)
    return one


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same lists and dataclasses, with every tensor in them changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(changed(one, change) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: changed(getattr(value, one.name), change) for one in fields(value)})
    return value


@contextmanager
def undone(changing: Sequence[Tensor]) -> Iterator[None]:
    """Puts back what was changed inside."""
    before = [tensor.clone() for tensor in changing]
    try:
        yield
    finally:
        for tensor, value in zip(changing, before, strict=True):
            tensor.copy_(value)


class NoHostReads(TorchDispatchMode):
    """Raises CannotCapture where this thread would wait for the device.

    `torch.cuda.set_sync_debug_mode` would stop the other threads of the process as well.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if waits(name, args) or (name == "_grouped_mm" and args[0].dtype != torch.bfloat16):
            # The product of experts is one kernel in bfloat16 alone; elsewhere it reads their sizes, unseen from here.
            raise CannotCapture(f"{name} waits for the device")
        result = func(*args, **kwargs)
        copies = name in COPIES
        leaves = tree_leaves((args, kwargs, result if copies else None))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        # An operator takes single numbers of the host along, and a copy to pinned memory need not be waited for.
        harmless = kwargs.get("non_blocking", args[-1] is True) if copies else not any(t.dim() for t in on_host)
        if on_host and len(on_host) < len(tensors) and not harmless:
            raise CannotCapture(f"{name} carries data between host and device")
        return result


def waits(operator: str, arguments: tuple) -> bool:
    """Whether the host has to know an operator's result, or the size of it."""
    indices = arguments[1] if operator in ("index", "index_put", "index_put_") else ()
    return operator in READS or any(index is not None and index.dtype in MASKS for index in indices)

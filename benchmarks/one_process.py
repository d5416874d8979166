"""A stand-in for accelerate where it is not installed: one process, one device, full precision.

For `gpu_road.py` on machines that lack the package; wherever accelerate is, it is used.
"""

import importlib.util
import sys
from contextlib import nullcontext
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed
from transformers.utils import is_accelerate_available


class DistributedType(Enum):
    NO = "NO"
    DEEPSPEED = "DEEPSPEED"


class PartialState:
    """The one process there is."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, cpu: bool = False, **_: Any) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")

    def wait_for_everyone(self) -> None:
        pass


class AcceleratorState:
    @staticmethod
    def _reset_state() -> None:
        pass


class Accelerator(PartialState):
    """What the training loops ask of accelerate."""

    distributed_type = DistributedType.NO

    def __init__(self, cpu: bool = False, mixed_precision: str = "no", **_: Any) -> None:
        super().__init__(cpu)
        if mixed_precision != "no":
            raise ValueError("without accelerate there is no mixed precision: set head.mixed_precision=no")
        self.gradient_state = SimpleNamespace(_set_sync_gradients=lambda _: None)
        self._kept: list[Any] = []
        self.trackers: list[Any] = []

    def prepare(self, *objects: Any) -> Any:
        self._kept += objects
        moved = [one.to(self.device) if isinstance(one, nn.Module) else one for one in objects]
        return moved[0] if len(moved) == 1 else tuple(moved)

    def save_state(self, directory: str) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        torch.save([one.state_dict() for one in self._kept], Path(directory) / "state.pt")

    def load_state(self, directory: str) -> None:
        states = torch.load(Path(directory) / "state.pt", weights_only=True)
        for one, state in zip(self._kept, states, strict=True):
            one.load_state_dict(state)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, norm)

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        return tensor

    def no_sync(self, model: nn.Module) -> Any:
        return nullcontext()

    def log(self, values: dict[str, Any], step: int) -> None:
        pass

    def print(self, *words: Any) -> None:
        print(*words, flush=True)


def stand_in() -> bool:
    """Makes `import accelerate` work; whether that was needed."""
    if importlib.util.find_spec("accelerate") is not None:
        return False
    is_accelerate_available()  # transformers remembers the answer: none of its own uses are to meet this
    package = ModuleType("accelerate")
    package.__dict__.update(
        __version__="0",
        __path__=[],
        Accelerator=Accelerator,
        PartialState=PartialState,
        DistributedDataParallelKwargs=SimpleNamespace,
    )
    state, utils = ModuleType("accelerate.state"), ModuleType("accelerate.utils")
    state.__dict__.update(AcceleratorState=AcceleratorState, PartialState=PartialState)
    utils.__dict__.update(
        set_seed=set_seed,
        DistributedType=DistributedType,
        GradientAccumulationPlugin=SimpleNamespace,
        InitProcessGroupKwargs=SimpleNamespace,
        ProjectConfiguration=SimpleNamespace,
    )
    for module in (package, state, utils):
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    return True

"""How training goes: a progress bar, metrics.jsonl, and accelerate's trackers."""

import json
import os
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from graft_inference.errors import GraftError
from graft_inference.files import parse_json
from graft_train.config.head import HeadTrainConfig
from graft_train.distill.metrics import StepSums
from graft_train.files import write_text
from graft_train.processes import say


class Progress:
    """Logs optimizer steps; silent on every process but the main one.

    Args:
        out: the stage's directory, which keeps metrics.jsonl and the id of the wandb run.
    """

    def __init__(self, accelerator: Accelerator, settings: HeadTrainConfig, out: Path) -> None:
        self.accelerator = accelerator
        self.settings = settings
        self.out = out
        self.main = accelerator.is_main_process
        self.bar: Any = None

    def begin(self, first: int, total: int) -> None:
        """Drops what was logged after the checkpoint that training goes on from."""
        if not self.main:
            return
        path = self.out / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        try:
            kept = [line for line in lines if line.endswith("\n") and parse_json(line)["step"] <= first]
        except (ValueError, LookupError, TypeError) as error:
            raise GraftError(f"{path} is damaged ({error}): mend its last lines, or move it away") from error
        write_text(path, "".join(kept))
        self.bar = tqdm(initial=first, total=total, desc="distill", unit="step")
        if self.settings.trackers:
            self._track(self._start_trackers)

    def log(self, step: int, sums: StepSums, rate: float, tokens: int, seconds: float) -> None:
        """Takes every step, writes each `log_every`-th and the last."""
        if not self.main:
            return
        self.bar.update(1)
        if step % self.settings.log_every and step != self.bar.total:
            return
        metrics = sums.metrics()
        record = {
            "step": step,
            **asdict(metrics),
            "learning_rate": rate,
            "tokens_per_second": round(tokens / seconds),
        }
        self.bar.set_postfix(loss=f"{metrics.loss[0]:.3f}", acceptance_length=f"{metrics.acceptance_length:.2f}")
        self._write(record)

    def log_measured(self, step: int, acceptance_length: float) -> None:
        """The acceptance length in the engine after a step, in a line of its own."""
        if self.main:
            self._write({"step": step, "measured_acceptance_length": acceptance_length})

    def _write(self, record: dict[str, Any]) -> None:
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._track(lambda: self.accelerator.log(flatten(record), step=record["step"]))

    def end(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for tracker in list(self.accelerator.trackers):  # end_training() would end the launch's processes, too
            self._track(tracker.finish)

    def _start_trackers(self) -> None:
        """A resumed training goes on in the wandb run whose id the stage's directory keeps."""
        path = self.out / "wandb_id"
        if "wandb" in self.settings.trackers and not path.exists():
            write_text(path, uuid.uuid4().hex[:8])
        wandb = {
            "id": path.read_text() if path.exists() else None,
            "dir": self.out,
            "resume": "allow",
            "mode": os.environ.get("WANDB_MODE", "offline"),
            "settings": {"silent": True},
        }
        # TensorBoard takes plain values alone.
        config = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in self.settings.decisive().items()
        }
        self.accelerator.init_trackers("graft-train", config, {"wandb": wandb})

    def _track(self, act: Callable[[], object]) -> None:
        """Trackers that fail are left out: a training is worth more, and metrics.jsonl has all they would get."""
        try:
            act()
        except Exception as error:  # each has kinds of its own
            self.accelerator.trackers.clear()
            names = ", ".join(self.settings.trackers)
            say(f"distill: goes on without {names}, which failed: {type(error).__name__} {error}")


def flatten(record: dict[str, Any]) -> dict[str, float]:
    """Lists become one curve per draft step: loss/0, loss/1, ..."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            flat |= {f"{name}/{step}": item for step, item in enumerate(value)}
        elif name != "step":
            flat[name] = value
    return flat

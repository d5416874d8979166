#!/usr/bin/env bash
# ProjectConfiguration(automatic_checkpoint_naming=True, total_limit=1) keeps one checkpoint, but save_state deletes the
# old one before it writes the new one, in place. Whatever ends the second save half-way (a full disk, a kill, a
# state_dict that raises, as here) leaves no checkpoint at all to go on from.
# Seen with accelerate 1.15.0 and torch 2.13.0. Why it matters: total_limit=1 or 2 is what one sets where disks are
# small, and there a save is likeliest to fail: the run that it was to protect is lost.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cd "$work"
OMP_NUM_THREADS=1 HF_HOME="$work/hf" "$work/venv/bin/python" - <<'PY'
from pathlib import Path

import accelerate
import torch
from accelerate.utils import ProjectConfiguration


class Counter:
    """What a script registers beside its model; the second time, its state cannot be had."""

    saves = 0

    def state_dict(self):
        self.saves += 1
        if self.saves == 2:
            raise OSError("no space left on device")
        return {"saves": self.saves}

    def load_state_dict(self, state):
        pass


settings = ProjectConfiguration(project_dir="run", automatic_checkpoint_naming=True, total_limit=1)
accelerator = accelerate.Accelerator(cpu=True, project_config=settings)
accelerator.prepare(torch.nn.Linear(4, 4))
accelerator.register_for_checkpointing(Counter())
found = []
for _ in range(2):
    try:
        accelerator.save_state()
    except OSError as error:
        print("the second save fails:", error)
    folders = sorted(Path("run/checkpoints").iterdir())
    found.append({path.name: (path / "custom_checkpoint_0.pkl").exists() for path in folders})
print("accelerate", accelerate.__version__, "checkpoints, and whether each is whole, after each save:", found)

assert found == [{"checkpoint_0": True}, {"checkpoint_1": False}]
PY

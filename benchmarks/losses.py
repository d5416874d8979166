"""Acceptance length by loss and by optimizer: the tables for docs/training.md, from a finished run's data.

    python benchmarks/losses.py experiment=quickstart run_dir=runs/quickstart
    python benchmarks/losses.py experiment=qwen3_8b run_dir=runs/qwen3_8b head.max_steps=2000

Trains a head per row into {run_dir}/losses/NAME, from the target and the samples of the run; other arguments are
the recipe's. "scratch" rows show which losses can train a new head at all; "continued" ones go on from the forward
KL's head. A row that is there already is not trained again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from graft_train.distill.divergence import LOSSES

ROOT = Path(__file__).parents[1]
ADAMW_RATES = (1e-3, 2.5e-3, 5e-3)


def rows(run_dir: Path) -> dict[str, list[str]]:
    """The settings of every head by its name."""
    first = run_dir.resolve() / "losses" / "forward_kl" / "head"
    whole = {"forward_kl": [], "survival": ["head.loss=survival"]}
    adamw = {f"adamw_{rate:g}": ["head.optimizer=adamw", f"head.learning_rate={rate}"] for rate in ADAMW_RATES}
    scratch = {f"scratch_{loss}": [f"head.loss={loss}", "head.max_steps=200"] for loss in LOSSES}
    goes_on = [f"head.init_from={first}", "head.max_steps=300", "head.learning_rate=1e-3"]
    return whole | adamw | scratch | {f"continued_{loss}": [f"head.loss={loss}", *goes_on] for loss in LOSSES}


def train(name: str, overrides: list[str], run_dir: Path, arguments: list[str]) -> dict:
    """The `training.json` of one head, trained in a run directory that borrows what came before."""
    directory = run_dir / "losses" / name
    directory.mkdir(parents=True, exist_ok=True)
    for borrowed in ("target", "data"):
        if (run_dir / borrowed).exists() and not (directory / borrowed).exists():
            (directory / borrowed).symlink_to((run_dir / borrowed).resolve())
    command = [sys.executable, "recipes/distill.py", *arguments, f"run_dir={directory.resolve()}", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ)
    return json.loads((directory / "head" / "training.json").read_text(encoding="utf-8"))


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    if "run_dir" not in given:
        sys.exit("which run? python benchmarks/losses.py experiment=quickstart run_dir=runs/quickstart")
    run_dir = Path(given["run_dir"])
    others = [argument for argument in sys.argv[1:] if not argument.startswith("run_dir=")]
    results = {name: train(name, overrides, run_dir, others) for name, overrides in rows(run_dir).items()}
    print("| head | steps | acceptance in the engine | acceptance, teacher-forced | acceptance by step | seconds |")
    print("|---|---:|---:|---:|---|---:|")
    for name, result in results.items():
        held_out = result["validation"] or {"acceptance_length": float("nan"), "acceptance": []}
        accepted = " ".join(f"{share:.2f}" for share in held_out["acceptance"])
        measured = result["measured_acceptance_length"]
        in_engine, forced = "" if measured is None else f"{measured:.2f}", held_out["acceptance_length"]
        print(f"| {name} | {result['steps']} | {in_engine} | {forced:.2f} | {accepted} | {result['seconds']:.0f} |")


if __name__ == "__main__":
    main()

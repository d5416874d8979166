"""A small run with all stages, whose page the tests look at."""

import json
from pathlib import Path
from typing import Any

from graft_train.calibrate import calibrate
from graft_train.evaluate import evaluate
from graft_train.files import write_json

from ...graft_inference.tiny import learned_policy
from .. import test_evaluate
from ..calibrate import test_stage

HOSTILE = "</script><img src=x onerror=\"document.title='taken over'\"> & 'quoted'"
"""What a prompt may hold."""


def write_run(run_dir: Path) -> Path:
    """Calibrated and evaluated for real; head and corpus are described as their stages do. Its texts are hostile."""
    run_dir.mkdir()
    test_evaluate.write_run(run_dir)
    calibrated = test_stage.write_run(run_dir.with_name("calibrated"))
    calibrate(test_stage.config_for(calibrated, num_steps=4, retrieval_depth=4)).rename(run_dir / "policy")
    # Which plans are fastest is chance here; these stop at every checkpoint, and ask all there is.
    write_json(run_dir / "policy" / "policy.json", learned_policy().to_dict())
    evaluate(test_evaluate.config_for(run_dir))
    _describe_head(run_dir / "head")
    _describe_corpus(run_dir / "corpus")
    _make_hostile(run_dir)
    return run_dir


def _record(directory: Path, stage: str) -> None:
    directory.mkdir(exist_ok=True)
    record = {"stage": stage, "settings": {"note": HOSTILE, "steps": 2}, "inputs": {"target": "t"}, "fingerprint": "f"}
    write_json(directory / "stage.json", record | {"seconds": 90.0, "versions": {"python": "3.11"}})


def _describe_head(directory: Path) -> None:
    _record(directory, "distill")
    validation = {"acceptance": [0.5, 0.4], "conditional_acceptance": [0.5, 0.6], "acceptance_length": 1.7}
    summary = {"steps": 20, "samples": 9, "coverage": 1.0, "validation_samples": 2, "validation": validation}
    write_json(directory / "training.json", summary | {"measured_acceptance_length": 1.6})
    lines: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": [3.0 / step, 4.0 / step],
            "acceptance": [0.1, 0.1],
            "conditional_acceptance": [0.02 * step, 0.01 * step],
            "acceptance_length": 1 + step / 20,
            "learning_rate": 1e-3,
            "tokens_per_second": 100,
        }
        for step in (10, 20)
    ]
    lines.append({"step": 20, "measured_acceptance_length": 1.6})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _describe_corpus(directory: Path) -> None:
    _record(directory, "build_corpus")
    recall = {"hit_rate": 0.9, "top_1": 0.3, "top_k": 0.6, "k": 4}
    examples = [{"token": HOSTILE, "successors": [[HOSTILE, 0.5], [" b", 0.25]]}]
    inspection = {"rows": 61, "rows_filled": 60, "bytes": {"successors.safetensors": 1500}, "held_out_tokens": 608}
    write_json(directory / "inspection.json", inspection | {"recall": recall, "examples": examples})


def _make_hostile(run_dir: Path) -> None:
    path = run_dir / "policy" / "texts.json"
    texts = json.loads(path.read_text())
    for answer in texts["answers"]:
        answer["prompt"] = HOSTILE
        answer["pieces"][2] = HOSTILE
    texts["tokens"] = {token: f"{text}<b>" for token, text in texts["tokens"].items()}
    write_json(path, texts)
    path = run_dir / "evaluation" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["settings"] |= {"suite": HOSTILE, "path": None}
    for number, method in enumerate(evaluation["methods"].values(), start=1):
        figures = {"prompts": 2, "tokens_per_second": 9.0, "speedup": 1.0 + number, "acceptance_length": 1.0 + number}
        method["by_category"] = {HOSTILE: figures, "math": figures}
    write_json(path, evaluation)

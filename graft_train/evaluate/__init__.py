"""`evaluate`: every method on the same prompts, in one interleaved run, against one engine."""

import gc
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graft_inference import METHODS
from graft_inference.files import read_json
from graft_train.arithmetic import with_dtype
from graft_train.config import Config
from graft_train.config.evaluation import EvaluateConfig
from graft_train.evaluate.lossless import losslessness
from graft_train.evaluate.prompts import ANSWERS, Asked, asked_of, check_unchanged, directory_of, made_of, shown_path
from graft_train.evaluate.summary import acceptance, by_category, plain_variation, repetition, summarize
from graft_train.evaluate.timing import Run, run_of, timed
from graft_train.export import write_card
from graft_train.files import write_json, write_text
from graft_train.processes import barrier, is_main, say
from graft_train.stage import run_stage
from graft_train.tables import draw, print_table, to_markdown

__all__ = ["EvaluateConfig", "Run", "evaluate"]
TIMED = "timed.json"
"""What was timed, from which a check of losslessness that fails goes on."""


def evaluate(config: Config) -> Path:
    """Writes `evaluation/` (evaluation.json, report.md, report.png) and renews the bundle's model card.

    With `evaluation.server`, see `evaluate_servers`.

    Raises:
        GraftError: no prompts, or prompts that the target cannot take; no memory to check losslessness.
    """
    asked, name = config.evaluation, directory_of(config.evaluation)
    if asked.servers():
        from graft_train.evaluate.served import evaluate_servers  # which needs the client of servers

        return evaluate_servers(config)
    stages, chosen = made_of(config)
    inputs = ["target", "bundle", *stages]
    config = with_dtype(config, inputs)
    settings = {**asdict(asked), "seed": config.seed, "dtype": config.target.dtype}
    for decides_nothing in ("server", "concurrency"):
        del settings[decides_nothing]
    del settings["check_lossless"]  # or runs that were timed could not be kept where the check does not fit
    settings |= chosen
    scratch = [TIMED, ANSWERS]
    directory = run_stage(config, "evaluate", name, settings, inputs, lambda out: _build(config, out, chosen), scratch)
    if is_main():
        evaluation = read_json(directory / "evaluation.json")
        write_card(Path(config.run_dir) / "bundle", {name: evaluation})
        print_table(evaluation)
        if config.evaluation.check_lossless and None in evaluation["lossless"].values():
            say(f"evaluate: made with evaluation.check_lossless=false; delete {directory} to have it checked")
    return directory


def _build(config: Config, out: Path, chosen: dict[str, Any]) -> None:
    asked, path = asked_of(config, out), out / TIMED
    check_unchanged(config, chosen, out)
    gc.collect()  # hooks and their target hold each other, and a large one is held once at a time
    if not path.exists():  # else an interrupted check left it
        found = timed(config, asked.samples)
        if is_main():
            write_json(path, found)
        barrier()
    gc.collect()
    lossless = losslessness(config, asked.samples)
    if is_main():
        _write(config, out, asked, read_json(path), lossless)


def _write(config: Config, out: Path, asked: Asked, found: dict[str, Any], lossless: dict[str, Any]) -> None:
    runs = {name: [[run_of(run) for run in prompt] for prompt in found["runs"][name]] for name in METHODS}
    baseline = runs["autoregressive"]
    evaluation = {
        "methods": {
            name: {
                **summarize(runs[name], baseline),
                **acceptance(runs[name], asked.samples),
                "by_category": by_category(runs[name], baseline, asked.categories),
            }
            for name in METHODS
        },
        **lossless,
        "variation": plain_variation(baseline, asked.samples),
        "device": found["device"],
        "settings": {
            **_facts(config, asked),
            "graphs": found["graphs"],
            "attention": found["attention"],
            "repetition": repetition(asked.samples, baseline),
            "plans": found["plans"],
        },
    }
    write_json(out / "evaluation.json", evaluation)
    write_text(out / "report.md", to_markdown(evaluation))
    draw(evaluation, out / "report.png")


def _facts(config: Config, asked: Asked) -> dict[str, Any]:
    """What a fair table states beside its figures."""
    lengths = [len(sample.prompt_ids) for sample in asked.samples]
    return {
        **asdict(config.evaluation),
        "path": shown_path(config.evaluation.path),
        "prompts": len(asked.samples),
        "prompt_tokens": [min(lengths), max(lengths)],
        "dtype": config.target.dtype,
        "batch": 1,
        "matrix": "built from the training split; every request starts from it anew and updates its own copy",
    }

"""Plans on the real engine, interleaved."""

from statistics import median
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from graft_inference import GraftEngine, Plan
from graft_train.calibrate.latency import RoundTimer
from graft_train.processes import is_main

BOOTSTRAP = 2000


def race(
    engine: GraftEngine,
    prompts: list[Tensor],
    plans: dict[str, Plan],
    max_new_tokens: int,
    temperature: float,
    repeats: int,
    timer: RoundTimer | None = None,
    redraws: bool = False,
) -> dict[str, dict[str, Any]]:
    """Tokens per second and acceptance length of each plan; the order turns with every prompt and repeat.

    At a temperature every plan continues a prompt by one text, whose seed is the prompt's place, as its trace's is.

    Args:
        timer: begins its table anew and times the device after every run, and every plan of its own as often as it
            has before: what slows down the racing plans slows down these latencies too.
        redraws: each repeat draws another text instead.

    Returns:
        By plan: `tokens_per_second` and `acceptance_length` over all prompts, and per prompt `tokens` and `seconds`
        (medians over repeats), from which `ratio` makes intervals.
    """
    names = list(plans)
    found: dict[str, list[list[tuple[int, float, int]]]] = {name: [[] for _ in prompts] for name in names}
    runs = repeats * len(prompts) * len(names)
    timings = max(runs, timer.repeats * len(timer.samples)) if timer else 0
    steps = timer.steps(-(-timings // len(timer.samples))) if timer else iter(())
    if timer:
        timer.forget()
    due = iter(np.diff(np.arange(runs + 1) * timings // runs))
    for name in names:  # warm-up
        engine.generate(prompts[0], max_new_tokens, temperature, plan=plans[name], seed=0)
    with tqdm(total=runs, desc="calibrate: race", unit="run", disable=not is_main()) as bar:
        for repeat in range(repeats):
            for index, prompt in enumerate(prompts):
                turn = (index + repeat) % len(names)
                order = names[turn:] + names[:turn]
                for name in order if repeat % 2 else reversed(order):
                    seed = index + redraws * repeat * len(prompts)
                    stats = engine.generate(prompt, max_new_tokens, temperature, plan=plans[name], seed=seed).stats
                    found[name][index].append((stats.emitted - 1, stats.decode_seconds, stats.rounds))
                    bar.update()
                    for _ in range(next(due)):
                        next(steps)
    return {name: _summary(found[name]) for name in names}


def _summary(runs: list[list[tuple[int, float, int]]]) -> dict[str, Any]:
    # At a temperature, repeats emit other tokens: the time per token is what repeats share.
    tokens = [sum(run[0] for run in prompt) / len(prompt) for prompt in runs]
    per_token = [median(run[1] / max(run[0], 1) for run in prompt) for prompt in runs]
    seconds = [count * time for count, time in zip(tokens, per_token, strict=True)]
    rounds = sum(run[2] for prompt in runs for run in prompt)
    emitted = sum(run[0] for prompt in runs for run in prompt)
    speed = sum(tokens) / sum(seconds) if sum(seconds) else 0.0
    return {
        "tokens_per_second": speed,
        "acceptance_length": emitted / max(rounds, 1),
        "tokens": tokens,
        "seconds": seconds,
    }


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float, float]:
    """Speed of one plan over another's, and the 95 % interval by bootstrap over prompts."""
    columns = [np.array(found[name]) for found in (ours, theirs) for name in ("tokens", "seconds")]
    drawn = np.random.default_rng(0).integers(len(columns[0]), size=(BOOTSTRAP, len(columns[0])))
    chosen = np.concatenate((np.arange(len(columns[0]))[None], drawn))
    tokens, seconds, base_tokens, base_seconds = (column[chosen].sum(axis=1) for column in columns)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = (tokens / seconds) / (base_tokens / base_seconds)
    low, high = np.nanpercentile(ratios[1:], [2.5, 97.5])
    return float(ratios[0]), float(low), float(high)

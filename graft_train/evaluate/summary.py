"""The figures of the timed runs: over all prompts, by category, by position in the answer and by context length."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import theilslopes

from graft_inference import GraftError
from graft_inference.steadiness import variation
from graft_train.data.samples import Sample
from graft_train.evaluate.timing import Run

BOOTSTRAP = 2000
LEAST_PROMPTS = 5
"""From so many on, prompts that were timed once tell what is usual."""
FIRST = {"position": 32, "context": 128}
"""Tokens in the first bucket; each one behind it ends at twice as many. Powers of two."""


def summarize(runs: list[list[Run]], baseline: list[list[Run]]) -> dict[str, Any]:
    """Sum of tokens over sum of each prompt's median decode time; ratios with a bootstrap over prompts.

    Raises:
        GraftError: the target ended every prompt with its first token.
    """
    typical = [_typical(prompt).stats for prompt in runs]
    rounds = sum(stats.rounds for stats in typical)
    if not rounds:
        raise GraftError("the target ended every evaluation prompt at once: evaluate on other data")
    ratios = _speedups(runs, baseline)
    phases: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    checkpoints: Counter[str] = Counter()
    fallback: Counter[str] = Counter()
    for stats in typical:
        phases.update(stats.seconds)
        accepted.update(stats.accepted)
        checkpoints.update(stats.checkpoints)
        fallback.update(stats.fallback)
    prefill = phases.pop("prefill")
    every = [run for prompt in runs for run in prompt]
    wall = sum(run.wall_seconds for run in every)
    same = [ours[0].tokens == theirs[0].tokens for ours, theirs in zip(runs, baseline, strict=True)]
    return {
        "tokens_per_second": _speed(runs),
        "speedup": _speed(runs) / _speed(baseline),
        "speedup_interval": interval(ratios),
        "acceptance_length": sum(stats.emitted - 1 for stats in typical) / rounds,
        "ms_per_round": {name: 1e3 * seconds / rounds for name, seconds in phases.items()},
        "prefill_ms": 1e3 * prefill / len(typical),
        "accepted_per_round": {name: count / rounds for name, count in accepted.items()},
        "checkpoints": dict(sorted(checkpoints.items())),
        "fallback": dict(sorted(fallback.items())),
        "same_tokens_as_autoregressive": sum(same) / len(same),
        "time_outside_phases": 1 - sum(sum(run.stats.seconds.values()) for run in every) / wall,
    }


def by_category(runs: list[list[Run]], baseline: list[list[Run]], categories: Sequence[str]) -> dict[str, Any]:
    """Speed-up and acceptance of each category's prompts; not of one whose prompts the target ended at once."""
    found = {}
    for name in sorted(set(categories)):
        places = [place for place, category in enumerate(categories) if category == name]
        ours, theirs = ([side[place] for place in places] for side in (runs, baseline))
        rounds = sum(_typical(prompt).stats.rounds for prompt in ours)
        if rounds and _tokens(theirs).any():
            found[name] = {
                "prompts": len(places),
                "tokens_per_second": _speed(ours),
                "speedup": _speed(ours) / _speed(theirs),
                "acceptance_length": float(_tokens(ours).sum() / rounds),
            }
    return found


def acceptance(runs: list[list[Run]], samples: Sequence[Sample]) -> dict[str, list[dict[str, Any]]]:
    """Tokens per round, by the tokens of the answer that stood before it, and by those of prompt and answer."""
    rounds = [
        (tokens, {"position": position, "context": len(sample.prompt_ids) + position})
        for prompt, sample in zip(runs, samples, strict=True)
        for position, tokens in _rounds(_typical(prompt).stats.sources)
    ]
    return {f"by_{kind}": _in_buckets([(tokens, at[kind]) for tokens, at in rounds], FIRST[kind]) for kind in FIRST}


def plain_variation(baseline: list[list[Run]], samples: Sequence[Sample]) -> float | None:
    """How much the time of the same plain decoding varied within the run, see `steadiness.variation`.

    Where every prompt was timed once, a token's time is set against what is usual at its prompt's length: attention
    makes a pass dearer in proportion to the context. None where too few prompts tell what is usual.
    """
    times = [
        (len(sample.prompt_ids), [run.stats.decode_seconds / (run.stats.emitted - 1) for run in prompt])
        for sample, prompt in zip(samples, baseline, strict=True)
        if all(run.stats.emitted > 1 for run in prompt)
    ]
    if any(len(found) > 1 for _, found in times):
        return variation([found for _, found in times])
    if len(times) < LEAST_PROMPTS:
        return None
    lengths, seconds = np.array([(length, found[0]) for length, found in times]).T
    rise = theilslopes(seconds, lengths)[0] if len({*lengths}) > 1 else 0.0
    return variation([(seconds - rise * (lengths - np.median(lengths))).tolist()])


def _rounds(sources: Sequence[str]) -> list[tuple[int, int]]:
    """Of each round, the tokens of the answer before it, and those that it added; the prefill gave the first.

    Every round ends with the target's own token, except a last one that the answer's end has cut.
    """
    starts = [1, *(place for place, source in enumerate(sources, start=1) if source == "bonus")]
    ends = [*starts[1:], len(sources)]
    return [(start, end - start) for start, end in zip(starts, ends, strict=True) if end > start]


def _in_buckets(rounds: list[tuple[int, int]], first: int) -> list[dict[str, Any]]:
    """Args:
    rounds: tokens of each, and the number that decides its bucket.
    """
    tokens: Counter[int] = Counter()
    count: Counter[int] = Counter()
    for added, number in rounds:
        low = 0 if number < first else 1 << (number.bit_length() - 1)
        tokens[low] += added
        count[low] += 1
    return [
        {
            "from": low,
            "to": max(first, 2 * low) - 1,
            "rounds": count[low],
            "acceptance_length": tokens[low] / count[low],
        }
        for low in sorted(count)
    ]


def _typical(repeats: list[Run]) -> Run:
    """The (lower) median by decode time: a real run, so its phases add up to its time."""
    return sorted(repeats, key=lambda run: run.stats.decode_seconds)[(len(repeats) - 1) // 2]


def _tokens(runs: list[list[Run]]) -> np.ndarray:
    """Decoded tokens per prompt; the prefill's own token is not among them."""
    return np.array([_typical(prompt).stats.emitted - 1 for prompt in runs], dtype=float)


def _seconds(runs: list[list[Run]]) -> np.ndarray:
    """Median decode time per prompt."""
    return np.array([_typical(prompt).stats.decode_seconds for prompt in runs])


def _speed(runs: list[list[Run]]) -> float:
    """Decoded tokens per second."""
    return float(_tokens(runs).sum() / _seconds(runs).sum())


def _speedups(runs: list[list[Run]], baseline: list[list[Run]]) -> np.ndarray:
    return speedups(_tokens(runs), _seconds(runs), _tokens(baseline), _seconds(baseline))


def speedups(*columns: np.ndarray) -> np.ndarray:
    """Bootstrap sample of a speed-up: prompts drawn anew, the same ones for both sides. [BOOTSTRAP]

    Args:
        columns: tokens and seconds of every prompt, and those of the baseline.
    """
    count = len(columns[0])
    chosen = np.random.default_rng(0).integers(count, size=(BOOTSTRAP, count))
    tokens, seconds, base_tokens, base_seconds = (column[chosen].sum(axis=1) for column in columns)
    # A prompt that ends at once has no decode time: a resample of such prompts alone says nothing.
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((tokens / seconds) / (base_tokens / base_seconds))


def interval(sample: np.ndarray) -> list[float]:
    """What 95 % of a bootstrap sample lie between."""
    return [float(bound) for bound in np.nanpercentile(sample, [2.5, 97.5])]


def repetition(samples: list[Sample], runs: list[list[Run]], length: int = 8) -> float:
    """Share of the answers' windows of `length` tokens that repeat earlier text of the same request.

    Retrieval thrives on repetition, and small targets are prone to it: a reader must know.
    """
    repeats = windows = 0
    for sample, prompt_runs in zip(samples, runs, strict=True):
        text = sample.prompt_ids + prompt_runs[0].tokens
        seen: set[tuple[int, ...]] = set()
        for end in range(length, len(text) + 1):
            window = tuple(text[end - length : end])
            if end - length >= len(sample.prompt_ids):
                windows += 1
                repeats += window in seen
            seen.add(window)
    return repeats / windows if windows else 0.0

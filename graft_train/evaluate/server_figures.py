"""What servers reached: speed of a request and in all, latencies, acceptance, and ratios with intervals."""

from typing import Any

import numpy as np

from graft_inference.errors import GraftError
from graft_inference.steadiness import variation
from graft_train.evaluate.server_passes import Timed
from graft_train.evaluate.summary import interval, speedups

Pass = dict[str, Any]
"""What `Server.run` returned."""


def figures_of(passes: list[Pass], baseline: list[Pass] | None) -> dict[str, Any]:
    """Of one server at one number of requests at a time.

    Args:
        passes: one for each repeat.
        baseline: those of the server that it is compared with; None: with none.

    Raises:
        GraftError: every answer came in one piece, so that there is no speed.
    """
    requests = _by_prompt(passes)
    every = [one for prompt in requests for one in prompt]
    tokens, seconds = _decoded(requests)
    if not tokens.sum() or not seconds.sum():
        raise GraftError(
            "every answer ended with its first piece, so that no speed can be told: evaluate on other data"
        )
    first = np.array([one.first_seconds for one in every])
    between = np.array([one.decode_seconds / one.decoded for one in every if one.decoded])
    found = {
        "requests": len(every),
        "tokens": sum(one.tokens for one in every),
        "tokens_per_second_in_all": _in_all(passes),
        "tokens_per_second": float(tokens.sum() / seconds.sum()),
        "first_token_ms": _spread(first),
        "between_tokens_ms": _spread(between),
        **acceptance_of([one["counts"] for one in passes]),
    }
    return found if baseline is None else found | _compared(passes, baseline)


def variation_of(levels: list[list[Pass]]) -> float | None:
    """How much a token's time varied from pass to pass, see `steadiness.variation`; None of one pass.

    Args:
        levels: the passes of one server, by requests at a time.
    """
    if len(levels[0]) < 2:
        return None
    return variation([(seconds / tokens).tolist() for tokens, seconds in map(_whole, levels)])


def acceptance_of(counts: list[dict[str, float] | None]) -> dict[str, Any]:
    """Tokens per round, and accepted tokens per round by their place in it; None where a server does not tell.

    Args:
        counts: what `/metrics` gained in each pass.
    """
    told = [one for one in counts if one and one.get("rounds")]
    rounds = sum(one["rounds"] for one in told)
    if not rounds or len(told) < len(counts):
        return {"acceptance_length": None, "accepted_by_position": None}
    last = max((int(name.split()[1]) for one in told for name in one if name.startswith("accepted ")), default=0)
    by_place = [sum(one.get(f"accepted {place}", 0.0) for one in told) / rounds for place in range(1, last + 1)]
    return {"acceptance_length": sum(one["tokens"] for one in told) / rounds, "accepted_by_position": by_place}


def _compared(passes: list[Pass], baseline: list[Pass]) -> dict[str, Any]:
    """How many times as fast; intervals by bootstrap over prompts, and in all over passes."""
    ours, theirs = _by_prompt(passes), _by_prompt(baseline)
    columns = [*_decoded(ours), *_decoded(theirs)]
    in_all = [*_whole(passes), *_whole(baseline)]
    answers = [(our[0].answer, their[0].answer) for our, their in zip(ours, theirs, strict=True)]
    told = all(one is not None for pair in answers for one in pair)
    ours_per_second, theirs_per_second = columns[0].sum() / columns[1].sum(), columns[2].sum() / columns[3].sum()
    return {
        "speedup": float(ours_per_second / theirs_per_second),
        "speedup_interval": interval(speedups(*columns)),
        "speedup_in_all": _in_all(passes) / _in_all(baseline),
        "speedup_in_all_interval": interval(speedups(*in_all)) if len(passes) > 1 else None,
        "same_answers": sum(our == their for our, their in answers) / len(answers) if told else None,
    }


def _by_prompt(passes: list[Pass]) -> list[list[Timed]]:
    """Of each prompt, its repeats."""
    return [[Timed(**one) for one in repeats] for repeats in zip(*(one["requests"] for one in passes), strict=True)]


def _decoded(requests: list[list[Timed]]) -> tuple[np.ndarray, np.ndarray]:
    """Of each prompt, the tokens behind the first piece and their seconds in the repeat of (lower) median time."""
    typical = [sorted(repeats, key=lambda one: one.decode_seconds)[(len(repeats) - 1) // 2] for repeats in requests]
    return np.array([one.decoded for one in typical], float), np.array([one.decode_seconds for one in typical])


def _whole(passes: list[Pass]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and seconds of every pass."""
    tokens = [sum(one["tokens"] for one in each["requests"]) for each in passes]
    return np.array(tokens, float), np.array([each["seconds"] for each in passes])


def _in_all(passes: list[Pass]) -> float:
    tokens, seconds = _whole(passes)
    return float(tokens.sum() / seconds.sum())


def _spread(seconds: np.ndarray) -> dict[str, float]:
    """Median and 95th percentile, in ms."""
    median, high = np.percentile(1e3 * seconds, [50, 95])
    return {"median": float(median), "p95": float(high)}

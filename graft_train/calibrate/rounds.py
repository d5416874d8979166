"""The times of single rounds, and what they say of a machine that is not idle."""

import numpy as np

UNDISTURBED = 0.25
"""The quantile of a plan's rounds that counts: whatever else runs on a machine only adds time."""

SPELL = 0.02
"""Seconds: many turns of programs that share a core."""

Round = dict[str, float]
"""Milliseconds by phase."""
Sample = list[Round]
"""The rounds of one short continuation, or means of those that follow each other."""


def undisturbed(samples: list[Sample], phase: str | None = None) -> float:
    """What a round takes where nothing else runs, or one phase of it: the lower quartile of all rounds, ms."""
    rounds = [one for sample in samples for one in sample]
    return float(np.quantile([whole_ms(one) if phase is None else one[phase] for one in rounds], UNDISTURBED))


def mean_ms(sample: Sample) -> float:
    """Of a round of a sample, all phases together."""
    return float(np.mean(list(map(whole_ms, sample))))


def whole_ms(one: Round) -> float:
    """All phases together."""
    return sum(one.values()) - one["prefill"]


def between(moments: list[tuple[int, dict[str, float]]]) -> Sample:
    """Milliseconds by phase of a round between moments, which are counts of rounds and seconds by then.

    Rounds that follow each other are taken together until they last for SPELL, and the mean is what counts: of two
    programs that take turns every few milliseconds a short round may meet one alone, and a long one meets both.
    """
    rounds: Sample = []
    count, before = moments[0]
    for now, seconds in moments[1:]:
        if not now:  # the prompt is read
            before = seconds
            continue
        spent = {name: seconds[name] - before[name] for name in seconds}
        if now > count and (sum(spent.values()) >= SPELL or (now == moments[-1][0] and not rounds)):
            rounds.append({name: 1e3 * time / (now - count) for name, time in spent.items()})
            count, before = now, seconds
    return rounds

"""Checks of what speculation costs and gains on this device."""

from graft_train.doctor.decoding import Cost, Fallen
from graft_train.doctor.finding import Finding, judged, unchecked

# Times of a few rounds are known to a tenth: below the break-even by that much, a round loses.
PAYS, PAYS_HINT = 0.9, 1.1
# The fallback times plain rounds now and then, and may leave a plan for a while where the text is hard.
PLANNED, PLANNED_HINT = 0.5, 0.8


def check_cost(cost: Cost | None) -> Finding:
    """Whether the acceptance length pays for what a round takes."""
    if cost is None:
        return unchecked("cost", "the target ended every prompt at once")
    pays = cost.acceptance_length / cost.pays_from
    return Finding(
        "cost",
        judged(pays, PAYS, PAYS_HINT),
        f"a round of the head alone ({cost.steps} steps, {cost.nodes} nodes) takes {cost.round_ms:.2f} ms, of which it "
        f"drafts {cost.draft_ms:.2f}, and a plain pass {cost.plain_ms:.2f}: it pays from an acceptance length of "
        f"{cost.pays_from:.2f}, and has {cost.acceptance_length:.2f}",
        "a draft step takes a tenth of a pass at most",
        "draft less and verify fewer nodes (policy.num_steps, policy.num_draft_tokens), choose the policy anew on this "
        "device (graft calibrate policy.latency_only=true), or train a smaller head (head.intermediate_size)",
        {
            "pays_from": cost.pays_from,
            "acceptance_length": cost.acceptance_length,
            "draft_ms": cost.draft_ms,
            "plain_ms": cost.plain_ms,
            "round_ms": cost.round_ms,
        },
    )


def check_fallback(fallen: Fallen | None, has_policy: bool) -> Finding:
    """Whether the learned plan is left for a narrower one, or never speculates."""
    if fallen is None:
        why = "too few rounds were made" if has_policy else "no policy was learned: run graft calibrate"
        return unchecked("fallback", why)
    share = 1 - fallen.fallen / fallen.rounds
    seen = f"{share:.0%} of {fallen.rounds:,} rounds were made as planned"
    if fallen.busy:
        return unchecked("fallback", f"{seen}, but other processes are at work here, and it goes by times")
    return Finding(
        "fallback",
        judged(share, PLANNED, PLANNED_HINT),
        seen if fallen.speculates else "the policy's plan never speculates: one node, no draft and no source",
        "nearly all: a plan is left only where it loses time",
        "choose the policy on this device and for these prompts: graft calibrate, graft export",
        {"as_planned": share},
    )

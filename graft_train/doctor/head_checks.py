"""Checks of what the head makes of the target's states: as it is, and otherwise.

Shares of some thousand positions are known to within three points, and ratios of them to within a tenth. Every
threshold lies further from what is usual than that.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from graft_inference.heads.block.model import BlockHead
from graft_inference.heads.eagle3.model import DraftHead
from graft_inference.heads.families import Head
from graft_train.distill.metrics import StepMetrics, StepSums
from graft_train.doctor.evidence import FAR, Evidence, accepted
from graft_train.doctor.finding import CAUSE, FINE, NOT_HERE, Finding, judged, unchecked

# A head is trained for its own states: read otherwise it loses most of its tokens. One that gains a fifth of a token,
# and a tenth of all, was trained for the other way.
GAIN, GAIN_SHARE = 0.2, 1.1
# On its training answers the quickstart's head chooses the target's token at 83 % of the positions, and one that was
# trained for 87 slow steps at 59 %. A table of what followed each token in them chooses it at 45 %: a head that is no
# better has learned nothing from the target's states.
LEARNED, LEARNED_HINT = 0.5, 0.65
# A head that saw 368 answers for 87 steps keeps three quarters on held-out ones; the quickstart's, which saw 240
# answers six times at a high rate, half. Where half is lost, more steps on the same answers are lost as well.
KEPT, KEPT_HINT = 0.5, 0.65
# Where one step was right, the next one is the easier for it: rates rise or stay from step to step. Heads that were
# never shown their own outputs fall to half.
DEEP, DEEP_HINT = 0.6, 0.8
REACHED = 30
"""Drafts that must have come to a step for its rate to count: fewer know it to ten points at best."""
# The same answers to the same questions, far behind: what remains is what the place costs, and noise of a tenth.
# Heads of SmolLM2 that were trained on texts of 200 tokens keep 81 and 98 % of them 2,000 tokens on.
FAR_KEPT, FAR_KEPT_HINT = 0.6, 0.75
# Some kinds of text are harder: a quarter less is no reason to gather data. A head of SmolLM2 that knows questions
# about Python keeps half as many tokens on HumanEval and GSM8K (docs/results.md).
YOURS, YOURS_HINT = 0.6, 0.75


def variants(head: Head, layers: int) -> Iterator[tuple[str, str, Head]]:
    """The head as it would be read by another convention: what differs, the setting, and the head.

    Args:
        layers: of the target.
    """
    ids = head.config.aux_layer_ids
    allowed = range(layers - isinstance(head, BlockHead))  # block heads may not read the last layer
    for shift in (-1, 1):
        moved = tuple(layer + shift for layer in ids)
        if moved[0] in allowed and moved[-1] in allowed:
            yield f"layers {list(moved)}", f"aux layers {list(moved)} (outputs, counted from 0)", _with(head, moved)
    if isinstance(head, DraftHead):
        flipped = not head.config.norm_before_residual
        said = f"norm_before_residual={str(flipped).lower()}"
        yield said, said, _with(head, ids, norm_before_residual=flipped)


def _with(head: Head, layers: tuple[int, ...], **changes: Any) -> Head:
    """The same weights under another configuration."""
    config = replace(head.config, aux_layer_ids=layers, **changes)
    return type(head).of_tensors(config, dict(head.state_dict()))  # type: ignore[arg-type]


def layers_of(head: Head, layers: int) -> tuple[int, ...]:
    """All that a check asks for."""
    read = {layer for _, _, other in variants(head, layers) for layer in other.config.aux_layer_ids}
    return tuple(sorted(read | set(head.config.aux_layer_ids)))


def check_aux_layers(evidence: Evidence, usual: StepSums | None) -> Finding:
    """Whether the head does better where its states are read by another convention.

    Args:
        usual: sums over `evidence.usual`, of the head as it is configured.
    """
    if usual is None:
        return unchecked("aux-layers", "there are no answers to look at")
    own, reads = usual.metrics(), evidence.usual
    best, setting, found = "", "", {"own": accepted(own)}
    for said, set_to, other in variants(evidence.head, evidence.target.config.num_hidden_layers):
        found[said] = accepted(evidence.acceptance(reads, other.to(evidence.target.device)))
        if not best or found[said] > found[best]:
            best, setting = said, set_to
    gains = found[best] > max(found["own"] + GAIN, GAIN_SHARE * found["own"]) if best else False
    layers = list(evidence.head.config.aux_layer_ids)
    seen = f"{found['own']:.2f} drafted tokens a round are kept as configured, with layers {layers}"
    return Finding(
        "aux-layers",
        CAUSE if gains else FINE,
        f"{seen}; {found[best]:.2f} with {best}" if best else seen,
        "most as configured, by far",
        f"the head was trained for {setting}: write that into its config.json and export again" if gains else "",
        found,
    )


def check_training(
    evidence: Evidence, trained: StepMetrics | None, held_out: StepMetrics | None, known: dict[str, Any]
) -> list[Finding]:
    """Whether the head has learned enough, and not by heart: on answers that it was trained on, and on others."""
    if trained is None:
        return [unchecked("under-training", NOT_HERE), unchecked("over-training", NOT_HERE)]
    first = trained.acceptance[0]
    steps = f", after {known['steps']:,} steps on {known['samples']:,} answers" if "steps" in known else ""
    under = Finding(
        "under-training",
        judged(first, LEARNED, LEARNED_HINT),
        f"on answers that it was trained on {first:.0%} of its first drafts are the target's token{steps}",
        "70 to 90 %",
        "train longer, or with a higher rate, until head/metrics.jsonl levels off: head.epochs, head.learning_rate",
        {"first_step": first},
    )
    if held_out is None or not accepted(trained):
        return [under, unchecked("over-training", "there are no answers that were held out")]
    kept = accepted(held_out) / accepted(trained)
    first_held = held_out.acceptance[0]
    over = Finding(
        "over-training",
        judged(kept, KEPT, KEPT_HINT),
        f"{accepted(held_out):.2f} drafted tokens a round are kept on held-out answers, {accepted(trained):.2f} on "
        f"those it was trained on ({kept:.0%}); of first drafts {first_held:.0%} and {first:.0%}",
        "three quarters and up",
        "more answers before more epochs: regenerate.samples, then graft distill",
        {"kept": kept, "trained": accepted(trained), "held_out": accepted(held_out)},
    )
    return [under, over]


def check_depth(usual: StepSums | None) -> Finding:
    """Whether later draft steps are as good as the first one; argument as `check_aux_layers`."""
    if usual is None:
        return unchecked("depth", "there are no answers to look at")
    known = [
        rate
        for rate, count in zip(usual.metrics().conditional_acceptance, usual.reached_K, strict=True)
        if count >= REACHED
    ]
    if len(known) < 2:
        return unchecked("depth", f"fewer than {REACHED} drafts come so far as to a second step")
    rates, kept = known, min(known[1:]) / max(known[0], 1e-9)
    return Finding(
        "depth",
        judged(kept, DEEP, DEEP_HINT),
        "where the drafts before were right, the next is at " + ", ".join(f"{rate:.0%}" for rate in rates),
        "the same at every step, or rising",
        f"train it as many steps ahead as plans draft: head.ttt_steps={len(usual.started_K)}",
        {"kept": kept, **{f"step_{step}": rate for step, rate in enumerate(rates, start=1)}},
    )


def check_context(evidence: Evidence) -> Finding:
    """Whether drafts are as good far behind the beginning of a text."""
    name, reads = "context", [*evidence.held_out, *evidence.trained, *evidence.yours]
    limit = min(evidence.target.max_positions, evidence.head.config.max_position_embeddings)
    behind, text = evidence.far(reads, limit)
    if text is None:
        return unchecked(name, "there is too little text to put one together that is long")
    near, far = accepted(evidence.acceptance(behind)), accepted(evidence.acceptance([text]))
    first = int(text.sample.loss_mask_S.nonzero()[0])
    kept = far / near if near else 1.0
    return Finding(
        name,
        judged(kept, FAR_KEPT, FAR_KEPT_HINT),
        f"behind {first:,} to {len(text.sample.tokens_S):,} tokens of other text {far:.2f} drafted tokens a round are "
        f"kept, {near:.2f} of the same answers alone ({kept:.0%})",
        f"eight tenths and up (looked at up to {min(limit, FAR):,} tokens)",
        "train with texts as long as those in use (head.max_length, regenerate.max_prompt_tokens), and see that the "
        "head's rope_parameters are those it was trained with",
        {"kept": kept, "near": near, "far": far},
    )


def check_prompts(own: StepMetrics | None, yours: StepMetrics | None) -> Finding:
    """Whether the head knows the user's kind of text."""
    if yours is None:
        return unchecked("prompts", "no --prompts FILE was given, or the target answers nothing to them")
    if own is None or not accepted(own):
        return unchecked("prompts", "there are no answers of another kind to hold yours against")
    kept = accepted(yours) / accepted(own)
    return Finding(
        "prompts",
        judged(kept, YOURS, YOURS_HINT),
        f"{accepted(yours):.2f} drafted tokens a round are kept on answers to your prompts, {accepted(own):.2f} on the "
        f"training data's ({kept:.0%})",
        "three quarters and up",
        "add prompts of your kind to the data: data.sources, graft regenerate, graft distill; and calibrate on them",
        {"kept": kept, "yours": accepted(yours), "own": accepted(own)},
    )

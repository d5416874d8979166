"""Checks of what the head learned from: whose answers, asked how, and with which tokens.

Each threshold says in its comment why it is where it is.
"""

import re
from calendar import month_abbr, month_name
from collections.abc import Sequence
from typing import Any

import torch

from graft_inference.chat_template import naming_refusals
from graft_train.data.samples import Sample
from graft_train.doctor.evidence import Evidence, Read, positions
from graft_train.doctor.finding import CAUSE, FINE, HINT, Finding, judged, unchecked

# Greedy answers are the target's likeliest tokens but for near ties, which are some per cent. Another model's share
# is that of two models' agreement on text that one of them wrote, 50 to 80 %.
AGREES, AGREES_HINT = 0.9, 0.95
# Drawn answers surprise the target as much as its own draws do, to within 0.1 nats over a thousand tokens. Other
# authors' texts cost a language model half a nat more and up.
SURPRISE, SURPRISE_HINT = 0.3, 0.15
# What cannot be drafted ends every draft that comes to it: one token in ten costs a chain of four a fifth of its
# drafts. Heads that draft 32,000 of 128,000 tokens reach 97 to 99 %.
COVERED, COVERED_HINT = 0.9, 0.95
# Templates end all questions alike. A few may be cut or of another kind; half of them are another template.
FRAMED, FRAMED_HINT = 0.5, 0.95
ASKED = "graftdoctorasks"
DATES = re.compile("|".join([r"\d+", *month_name[1:], *month_abbr[1:]]))


def check_answers(evidence: Evidence) -> Finding:
    """Whether the target wrote the answers that the head was trained on."""
    name = "answers"
    if not evidence.trained:
        return unchecked(name, "the answers that the head was trained on are not here")
    greedy = [read for read in evidence.trained if read.temperature == 0]
    drawn = [read for read in evidence.trained if read.temperature != 0]
    agrees, surprise = _agreement(evidence.trained), _surprise(drawn)
    verdicts, said, figures = [], [], {"agreement": agrees}
    if greedy:
        verdicts.append(judged(_agreement(greedy), AGREES, AGREES_HINT))
        said.append(f"{_agreement(greedy):.0%} of the greedy answers' tokens are the target's likeliest ones")
    if drawn:
        figures["excess_surprise"] = surprise
        own = judged(-surprise, -SURPRISE, -SURPRISE_HINT)
        # Of answers that nobody says how they were drawn some are greedy, and surprise less.
        verdicts.append(FINE if _agreement(drawn) >= AGREES_HINT else own)
        said.append(f"the others' tokens surprise the target by {surprise:+.2f} nats against its own draws")
    return Finding(
        name,
        CAUSE if CAUSE in verdicts else HINT if HINT in verdicts else FINE,
        "; ".join(said),
        "95 % and up of greedy answers; drawn ones surprise it by 0.1 nats more at most",
        "let this very target answer, and train again: graft regenerate regenerate.answers=target, graft distill",
        figures,
    )


def _agreement(reads: Sequence[Read]) -> float:
    return float(torch.cat([read.predicted.agrees_A for read in reads]).float().mean()) if reads else 1.0


def _surprise(reads: Sequence[Read]) -> float:
    if not reads:
        return 0.0
    return float(torch.cat([read.predicted.surprise_A - read.predicted.entropy_A for read in reads]).mean())


def check_template(tokenizer: Any, variables: dict[str, Any], trained: Sequence[Sample] | None) -> Finding:
    """Whether the prompts of the training were written by the chat template as it is used now."""
    name = "template"
    if not trained:
        return unchecked(name, "the prompts that the head was trained on are not here")
    if not tokenizer.chat_template:
        return unchecked(name, "the target has no chat template")
    with naming_refusals():
        text = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": ASKED}], add_generation_prompt=True, tokenize=False, **variables
            )
        )
    opening, _, closing = (_plain(part) for part in text.rpartition(ASKED))
    prompts = [_plain(tokenizer.decode(sample.prompt_ids, skip_special_tokens=False)) for sample in trained]
    opened = sum(prompt.startswith(opening) for prompt in prompts) / len(prompts)
    closed = sum(prompt.endswith(closing) for prompt in prompts) / len(prompts)
    verdict = judged(closed, FRAMED, FRAMED_HINT)
    if verdict == FINE and opened < FRAMED:  # their own system prompts open some conversations otherwise
        verdict = HINT
    ends = _shown(tokenizer, trained[0])
    told = f" told {variables}" if variables else ""
    seen = f"{closed:.0%} of the training prompts end as the template{told} ends a question, {opened:.0%} begin so"
    if verdict != FINE:
        seen += f"; the template writes …{text.rpartition(ASKED)[2]!r}, the first of them ends …{ends!r}"
    return Finding(
        name,
        verdict,
        seen,
        "all of them, but for conversations with a system prompt of their own",
        "serve with the template and variables of the training (--template-variable), or train with those in use: "
        "graft regenerate 'data.chat_template_kwargs={enable_thinking: false}', graft distill",
        {"closing": closed, "opening": opened},
    )


def _plain(text: str) -> str:
    """Without blanks, which tokenizers move, and dates, which templates write."""
    return "".join(DATES.sub("", text).split())


def _shown(tokenizer: Any, sample: Sample) -> str:
    return str(tokenizer.decode(sample.prompt_ids[-8:], skip_special_tokens=False))


def check_vocabulary(evidence: Evidence) -> Finding:
    """How many of the tokens that are to be drafted the head can propose."""
    name, head = "vocabulary", evidence.head
    reads = evidence.usual
    if not reads:
        return unchecked(name, "there are no answers to look at")
    known_V = torch.zeros(head.config.vocab_size, dtype=torch.bool)
    known_V[head.target_ids.cpu()] = True
    shares = {"covered": _covered(reads, known_V)}
    seen = (
        f"the head can propose {shares['covered']:.1%} of the answers' tokens ({int(known_V.sum()):,} tokens are known)"
    )
    if evidence.yours:
        shares["covered_yours"] = _covered(evidence.yours, known_V)
        seen += f", and {shares['covered_yours']:.1%} of those to your prompts"
    return Finding(
        name,
        judged(shares["covered"], COVERED, COVERED_HINT),
        seen,
        "97 to 100 %",
        f"train with more: head.draft_vocab_size={min(8 * head.config.draft_vocab_size, head.config.vocab_size)}, or "
        "with answers of the kind that is asked for",
        shares,
    )


def _covered(reads: Sequence[Read], known_V: torch.Tensor) -> float:
    tokens = torch.cat([read.sample.tokens_S[read.sample.loss_mask_S] for read in reads])
    return float(known_V[tokens].float().mean())


def check_ties(evidence: Evidence) -> Finding:
    """How often bfloat16 may decide otherwise than exact arithmetic."""
    reads = [*evidence.trained, *evidence.held_out, *evidence.yours]
    if not reads:
        return unchecked("ties", "there are no answers to look at")
    best, gap = (torch.cat([getattr(read.predicted, name) for read in reads]) for name in ("best_A", "gap_A"))
    share = float((gap <= bf16_step(best)).float().mean())
    return Finding(
        "ties",
        judged(-share, -TIED, -TIED_HINT),
        f"at {share:.1%} of {positions(reads):,} positions the target's best two logits are within a step of bfloat16",
        "1 to 4 %",
        "serve in float32 (target.dtype=float32) or float16 where that fits; where it does not, no head foretells "
        "these tokens",
        {"tied": share},
    )


# Language models' logits are about 20, where bfloat16 counts in steps of an eighth; so near are one to four per cent of
# the best two. At one in seven, rounding ends as many drafts as a good head's own errors do.
TIED, TIED_HINT = 0.15, 0.08


def bf16_step(value_A: torch.Tensor) -> torch.Tensor:
    """The distance between neighbours of bfloat16, which keeps eight bits, at these values."""
    return torch.exp2(torch.floor(torch.log2(value_A.abs().clamp(min=1e-30))) - 7)

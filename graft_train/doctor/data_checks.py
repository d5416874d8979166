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
from graft_train.doctor.finding import CAUSE, FINE, HINT, NOT_HERE, Finding, judged, unchecked

# The target's own answers agree with its likeliest tokens as often as its probabilities say: always, but for near ties,
# where they are greedy, and to within three points of a thousand tokens where they were drawn. Of what others wrote
# SmolLM2 agrees with about half (docstrings: 52 %; were they its own at temperature 0.8, it would with 63 %).
MISSED, MISSED_HINT = 0.07, 0.04
# Of answers that nobody says how they were drawn greedy ones agree, and draws at temperature 1 at 75 % or so.
UNTOLD, UNTOLD_HINT = 0.7, 0.9
# What cannot be drafted ends every draft that comes to it: one token in ten costs a chain of four faultless drafts a
# quarter of them. On held-out answers of SmolLM2's 97 % are covered by 8,192 tokens chosen from 368 answers, 91 % by
# 4,096 from 240.
COVERED, COVERED_HINT = 0.9, 0.95
# Templates end all questions alike. A few may be cut or of another kind; half of them are another template.
FRAMED, FRAMED_HINT = 0.5, 0.95
# Language models' logits are about 20, where bfloat16 counts in steps of an eighth; SmolLM2's best two are as near at
# 5 % of the positions. At one in seven, rounding ends as many drafts as a good head's own errors do.
TIED, TIED_HINT = 0.15, 0.08
ASKED = "graftdoctorasks"
DATES = re.compile("|".join([r"\d+", *month_name[1:], *month_abbr[1:]]))


def check_answers(evidence: Evidence) -> Finding:
    """Whether the target wrote the answers that the head was trained on."""
    name = "answers"
    if not evidence.trained:
        return unchecked(name, NOT_HERE)
    told = [read for read in evidence.trained if read.temperature is not None]
    untold = [read for read in evidence.trained if read.temperature is None]
    verdicts, said, figures = [], [], {}
    if told:
        figures["agreement"], figures["expected"], chance = agreement(told)
        missed = figures["expected"] - figures["agreement"] - 2 * chance
        verdicts.append(judged(-missed, -MISSED, -MISSED_HINT))
        said.append(
            f"{figures['agreement']:.0%} of the answers' tokens are the target's likeliest ones, "
            f"{figures['expected']:.0%} of its own would be"
        )
    if untold:
        figures["agreement_untold"], *_ = agreement(untold)
        verdicts.append(judged(figures["agreement_untold"], UNTOLD, UNTOLD_HINT))
        said.append(
            f"{figures['agreement_untold']:.0%} are its likeliest ones in answers that it is not known to have written"
        )
    return Finding(
        name,
        CAUSE if CAUSE in verdicts else HINT if HINT in verdicts else FINE,
        "; ".join(said),
        "as many as of its own, to within three points",
        "let this very target answer, and train again: graft regenerate regenerate.answers=target, graft distill",
        figures,
    )


def agreement(reads: Sequence[Read]) -> tuple[float, float, float]:
    """The share of tokens that are the target's likeliest ones; what it is of the target's own answers, and by how much
    that varies by chance (a standard error)."""
    agrees_A = torch.cat([read.predicted.agrees_A for read in reads]).float()
    likeliest_A = torch.cat([read.predicted.likeliest_A for read in reads])
    error = (likeliest_A * (1 - likeliest_A)).sum().sqrt() / len(likeliest_A)
    return agrees_A.mean().item(), likeliest_A.mean().item(), error.item()


def check_template(tokenizer: Any, variables: dict[str, Any], trained: Sequence[Sample] | None) -> Finding:
    """Whether the prompts of the training were written by the chat template as it is used now."""
    name = "template"
    if not trained:
        return unchecked(name, NOT_HERE)
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
    tied = torch.cat([read.predicted.gap_A <= bf16_step(read.predicted.best_A) for read in reads])
    share = float(tied.float().mean())
    return Finding(
        "ties",
        judged(-share, -TIED, -TIED_HINT),
        f"at {share:.1%} of {positions(reads):,} positions the target's best two logits are within a step of bfloat16",
        "some 5 %",
        "serve in float32 (target.dtype=float32) or float16 where that fits; where it does not, no head foretells "
        "these tokens",
        {"tied": share},
    )


def bf16_step(value_A: torch.Tensor) -> torch.Tensor:
    """The distance between neighbours of bfloat16, which keeps eight bits, at these values."""
    return torch.exp2(torch.floor(torch.log2(value_A.abs().clamp(min=1e-30))) - 7)

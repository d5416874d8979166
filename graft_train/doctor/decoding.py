"""The engine at work for a few seconds: answers to prompts that have none, what rounds cost here, and the fallback."""

import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tqdm import tqdm

from graft_inference import GenerationStats, GraftEngine, GraftError, Policy
from graft_inference.bundle import Bundle
from graft_inference.heads.families import most_steps
from graft_inference.policy.fallback import AS_PLANNED, MEASURED
from graft_inference.policy.plan import AUTOREGRESSIVE, Plan, QuotaCheckpoint, QuotaPlan
from graft_inference.target.model import max_positions
from graft_train.config.data import DataConfig
from graft_train.data.chat import Chat
from graft_train.data.documents import read_documents
from graft_train.data.prompts import build_prompts
from graft_train.data.samples import Sample, answered
from graft_train.doctor.case import LONGEST, SAMPLES, Case

ANSWER = 64
"""Tokens of an answer that is made for the examination."""
TIMED, TIMED_TOKENS = 3, 48
"""Prompts on which rounds are timed, and tokens of each."""
SERVED, ENOUGH = 100, 20
"""Rounds of the learned plan that are looked at where prompts last, and those without which nothing is said."""
ALONE = 0.7
"""Processor seconds of this process in a second, of a process that has a core for itself."""
OWN = "questions"
"""What a bundle is asked that brings no text: see `data.path`."""


@dataclass
class Cost:
    """What a round takes on this device, over the same prompts.

    Attributes:
        plain_ms: a pass of the target over one token.
        draft_ms: of a round, the head.
        round_ms: a round of the head alone, tree and verification included.
        acceptance_length: tokens that such a round emitted.
        steps, nodes: of its plan: most draft steps, and nodes of the largest verification.
    """

    plain_ms: float
    draft_ms: float
    round_ms: float
    acceptance_length: float
    steps: int
    nodes: int

    @property
    def pays_from(self) -> float:
        """The acceptance length at which a round is as fast as plain decoding."""
        return self.round_ms / self.plain_ms


@dataclass
class Fallen:
    """Attributes:
    rounds: of the learned plan, and those that the fallback gave to a narrower one or to none.
    speculates: whether it is a plan of more than plain decoding.
    busy: whether other processes took so much of this machine that its times say little.
    """

    rounds: int
    fallen: int
    speculates: bool
    busy: bool = False


@dataclass
class Decoded:
    """Attributes:
    cost: None where the target ended every prompt at once.
    fallen: None where there is no policy, or where it made too few rounds.
    """

    yours: list[Sample]
    answers: list[Sample]
    cost: Cost | None = None
    fallen: Fallen | None = None


def prompts_of(case: Case, path: str, variables: dict[str, object]) -> list[Sample]:
    """The prompts of a file, as `data.path` is read.

    Raises:
        GraftError: none there, or the target has no chat template and they are conversations.
    """
    if path == OWN and not case.tokenizer.chat_template:
        raise GraftError("there are no answers to look at, and the target has no chat template: pass --prompts FILE")
    config = case.model.config.get_text_config()
    chat, room = Chat(case.tokenizer, set(case.ends), variables, config.vocab_size), max_positions(config) - ANSWER
    data = DataConfig(path=path)
    try:
        made = build_prompts(read_documents(data), chat, data, count=SAMPLES, max_tokens=min(LONGEST, room), seed=0)
    except GraftError as error:
        raise GraftError(f"--prompts {path}: {error}") from error
    return [Sample(prompt.id, "evaluation", prompt.ids) for prompt in made]


def decode(case: Case, yours: Sequence[Sample]) -> Decoded:
    """Runs the engine.

    Args:
        yours: prompts of the user's.

    Raises:
        GraftError: a family that cannot be served.
    """
    steps = min(4, most_steps(case.head.config) or 4)
    plan = QuotaPlan((QuotaCheckpoint(steps, drafted=steps),), topk=1)
    policy = case.policy or Policy(plan, plan, AUTOREGRESSIVE)
    # The engine casts and packs what it is given, and the head is looked at as it is.
    bundle = Bundle(deepcopy(case.head), policy, case.successors)
    with warnings.catch_warnings(record=True) as told:  # such as of a policy that was learned on another device
        warnings.simplefilter("always")
        engine = GraftEngine.from_bundle(bundle, case.model, tokenizer=case.tokenizer, fallback=False)
    for warning in told:
        print(f"doctor: note: {warning.message}", file=sys.stderr)
    engine.eos_token_ids = case.ends
    try:
        known = [*case.asked, *case.held_out, *(case.trained or [])]
        known = [sample for sample in known if len(sample.prompt_ids) < engine.target.max_positions]
        missing = [] if case.held_out else [sample for sample in known if not sample.answers]
        decoded = Decoded(_answered(engine, yours, "your prompts"), _answered(engine, missing, "held-out prompts"))
        prompts = [torch.tensor(sample.prompt_ids) for sample in [*yours, *known]]
        decoded.cost = _cost(engine, prompts[:TIMED])
        if case.policy is not None:
            decoded.fallen = _fallen(engine, prompts)
        return decoded
    finally:
        engine.target.release()


def _answered(engine: GraftEngine, prompts: Sequence[Sample], what: str) -> list[Sample]:
    """What the target greedily answers."""
    found = []
    for prompt in tqdm(prompts, desc=f"doctor: answers to {what}", unit="answer", leave=False):
        ids = prompt.prompt_ids
        out = engine.generate(torch.tensor(ids), _room(engine, len(ids), ANSWER), method="autoregressive")
        found.append(answered(prompt.id, ids, out.sequences[0, len(ids) :].tolist(), {"temperature": 0.0}))
    return [sample for sample in found if sample.answers]


def _room(engine: GraftEngine, prompt: int, tokens: int) -> int:
    return max(1, min(tokens, engine.target.max_positions - prompt))


def _cost(engine: GraftEngine, prompts: Sequence[torch.Tensor]) -> Cost | None:
    """Plain decoding and the head's own plan in turns, after a warm-up of both."""
    methods, plan = ("autoregressive", "eagle3"), engine.policy.eagle3
    runs: dict[str, list[GenerationStats]] = {method: [] for method in methods}
    for prompt in [*prompts[:1], *prompts]:
        for method in methods:
            runs[method].append(engine.generate(prompt, _room(engine, len(prompt), TIMED_TOKENS), method=method).stats)
    plain, own = (sum_of(runs[method][1:]) for method in methods)
    if not (plain.rounds and own.rounds):
        return None
    return Cost(
        plain_ms=1e3 * plain.seconds / plain.rounds,
        draft_ms=1e3 * own.drafting / own.rounds,
        round_ms=1e3 * own.seconds / own.rounds,
        acceptance_length=own.tokens / own.rounds,
        steps=plan.num_steps,
        nodes=plan.num_draft_tokens,
    )


class Sums(NamedTuple):
    """Of several generations; the prefill and its token are not counted."""

    rounds: int
    tokens: int
    seconds: float
    drafting: float


def sum_of(runs: Sequence[GenerationStats]) -> Sums:
    rows = [(run.rounds, run.emitted - 1, run.decode_seconds, run.seconds["draft"]) for run in runs]
    return Sums(*map(sum, zip(*rows, strict=True))) if rows else Sums(0, 0, 0.0, 0.0)


def _fallen(engine: GraftEngine, prompts: Sequence[torch.Tensor]) -> Fallen | None:
    """The learned plan with the fallback on, as it is served."""
    plan: Plan = engine.policy.graft
    if plan.num_draft_tokens == 1:
        return Fallen(1, 1, speculates=False)
    chosen: Counter[str] = Counter()
    engine.fallback = True
    started, used = time.perf_counter(), time.process_time()
    for prompt in prompts:
        if sum(chosen.values()) < SERVED:
            chosen += engine.generate(prompt, _room(engine, len(prompt), TIMED_TOKENS), method="graft").stats.fallback
    engine.fallback = False
    share = (time.process_time() - used) / (time.perf_counter() - started)
    busy = engine.target.device.type == "cpu" and share < ALONE
    rounds = sum(chosen.values()) - chosen[MEASURED]
    return Fallen(rounds, rounds - chosen[AS_PLANNED], speculates=True, busy=busy) if rounds >= ENOUGH else None

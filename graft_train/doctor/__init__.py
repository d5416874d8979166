"""`graft doctor`: why acceptance is low.

Target and head are asked the same as in training and serving, by the same code: `evidence.py` has the target read some
answers once, `decoding.py` has the engine decode for some seconds, and every check is a function of what they found.
The checks stand in the order in which they are the cause most often.
"""

import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from typing import Any

from graft_inference.chat_template import check_variables, template_variables
from graft_inference.heads.families import most_steps
from graft_train.distill.metrics import StepMetrics
from graft_train.doctor.case import Case, DoctorOptions, open_case
from graft_train.doctor.data_checks import check_answers, check_template, check_ties, check_vocabulary
from graft_train.doctor.decoding import OWN, Cost, Decoded, decode, prompts_of
from graft_train.doctor.device_checks import check_cost, check_fallback
from graft_train.doctor.evidence import LEAST_STEPS, MOST_STEPS, Evidence, evidence_of
from graft_train.doctor.finding import Finding, ordered
from graft_train.doctor.head_checks import (
    check_aux_layers,
    check_context,
    check_depth,
    check_prompts,
    check_training,
    layers_of,
)
from graft_train.doctor.show import show, to_json

__all__ = ["DoctorOptions", "Examined", "doctor", "examine"]


@dataclass
class Examined:
    """Attributes:
    place, target: as they were named.
    lengths: acceptance length of a greedy chain, by whose answers: `trained`, `held_out`, `yours`; and `decoded`, of
        the engine.
    steps: draft steps of that chain.
    findings: the worst first.
    """

    place: str
    target: str
    steps: int
    lengths: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def doctor(options: DoctorOptions) -> None:
    """Examines a run or a bundle, and prints what was found.

    Raises:
        GraftError: what `examine` raises.
    """
    with redirect_stdout(sys.stderr):  # what reading data has to say is none of the result
        examined = examine(options)
    if options.as_json:
        print(to_json(examined.to_dict()))
    else:
        show(examined.place, examined.target, examined.lengths, examined.steps, examined.findings)


def examine(options: DoctorOptions) -> Examined:
    """Examines a run or a bundle.

    Raises:
        GraftError: what is named cannot be read: no run or bundle, another target, no prompts.
    """
    variables: dict[str, Any] = template_variables(options.template_variable)
    _say("loads head and target")
    case = open_case(options)
    check_variables(case.tokenizer, variables, "--template-variable")
    yours = prompts_of(case, options.prompts, variables) if options.prompts else []
    if not (yours or case.held_out or case.asked or case.trained):
        case.asked = prompts_of(case, OWN, variables)
    _say("decodes some prompts")
    decoded = decode(case, yours)
    layers = layers_of(case.head, case.model.config.get_text_config().num_hidden_layers)
    with evidence_of(case.model, case.head, layers, _steps(case)) as evidence:
        evidence.trained = evidence.read(case.trained or [], "answers that were trained on")
        evidence.held_out = evidence.read([*case.held_out, *decoded.answers], "held-out answers")
        evidence.yours = evidence.read(decoded.yours, "answers to your prompts")
        _say("asks the head")
        lengths, findings = _checked(case, evidence, decoded, variables)
    return Examined(options.place, case.target, evidence.steps, lengths, ordered(findings))


def _steps(case: Case) -> int:
    """As many as plans draft; a chain of all that a block head drafts at once."""
    planned = case.policy.eagle3.num_steps if case.policy else 4
    return most_steps(case.head.config) or min(max(planned, LEAST_STEPS), MOST_STEPS)


def _checked(
    case: Case, evidence: Evidence, decoded: Decoded, variables: dict[str, Any]
) -> tuple[dict[str, float], list[Finding]]:
    """Acceptance lengths, and the findings in the order of the checks."""
    groups = {"trained": evidence.trained, "held_out": evidence.held_out, "yours": evidence.yours}
    sums = {name: evidence.sums(reads) for name, reads in groups.items() if reads}
    found: dict[str, StepMetrics] = {name: one.metrics() for name, one in sums.items()}
    trained, held_out, yours = (found.get(name) for name in groups)
    usual = next((one for name in ("held_out", "trained", "yours") if (one := sums.get(name))), None)
    lengths = {name: metrics.acceptance_length for name, metrics in found.items()}
    cost: Cost | None = decoded.cost
    if cost is not None:
        lengths["decoded"] = cost.acceptance_length
    findings = [
        check_answers(evidence),
        check_template(case.tokenizer, variables, case.trained),
        check_vocabulary(evidence),
        check_aux_layers(evidence, usual),
        *check_training(evidence, trained, held_out, case.known),
        check_depth(usual),
        check_context(evidence),
        check_prompts(held_out or trained, yours),
        check_cost(cost),
        check_fallback(decoded.fallen, case.policy is not None),
        check_ties(evidence),
    ]
    return lengths, findings


def _say(what: str) -> None:
    print(f"doctor: {what}", file=sys.stderr, flush=True)

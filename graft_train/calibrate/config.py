"""Settings of the `calibrate` stage."""

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class CalibrateConfig:
    """What the policy is chosen from.

    Attributes:
        prompts: calibration prompts traced; none of them was trained on or is evaluated on.
        max_new_tokens: tokens traced per prompt.
        beam_width: the head's children per node and nodes per pass.
        max_passes: most head passes of a round; EAGLE-3 at depth 8 runs 9.
        widths: rows of one verification that may be chosen, the root included; the last is the budget.
        retrieval_depth: longest retrieved path.
        checkpoints: most places where drafting may stop early.
        repeats: timed repetitions of each latency and of each finalist.
    """

    prompts: int = 64
    max_new_tokens: int = 256
    beam_width: int = 10
    max_passes: int = 9
    widths: list[int] = field(default_factory=lambda: [1, 8, 16, 32, 64])
    retrieval_depth: int = 9
    checkpoints: int = 3
    repeats: int = 5

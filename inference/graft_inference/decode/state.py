"""What a request carries from round to round."""

from dataclasses import dataclass, field

from torch import Tensor

from ..heads.eagle3.drafter import Drafter
from ..noise import Noise
from ..policy.fallback import Fallback
from ..policy.plan import Plan
from ..policy.tree_builder import Grafter
from ..retrieval.ngrams import NgramSource
from ..retrieval.prompt_lookup import Echo
from ..retrieval.successor_matrix import SuccessorMatrix
from ..stats import GenerationStats, PhaseClock
from ..target.kv_cache import TreeCache
from ..tree import DraftTree
from .sampling import Sampler


@dataclass
class DecodeState:
    """Everything that changes while one prompt is decoded.

    Attributes:
        plan, grafter: of this round.
        fallback_plans: what the engine's fallback chooses them from for each round; empty for the same ones throughout.
        fallbacks: of that fallback_plans, by the bit length of how many prompts are decoded together.
        ngrams: looked up in the matrix's place where the plan says so; backs off to it.
        echo: this request's own text, where the plan searches it.
        learns: whether the matrix is updated.
        place: tokens emitted so far; what was accepted beyond the request's end counts too.
        noise: of this round's draws; None where nothing is drawn by chance.
        root_1: the last emitted token, not yet in the cache; of a prompt that is not read yet, its own last.
        fresh_tokens_A, fresh_aux_AE: what the last round committed, or the last piece of the prompt: states and the
            token after each.
        retrieved: this round's retrieved candidates by source, once looked up.
        history_S: prompt and emitted tokens, where a logits processor reads them.
        tokens: emitted tokens, where the prefix is kept.
        logprobs: of the emitted tokens, where wanted.
    """

    plan: Plan
    grafter: Grafter
    fallback_plans: tuple[Grafter, ...]
    cache: TreeCache
    drafter: Drafter | None
    successors: SuccessorMatrix | None
    ngrams: NgramSource | None
    echo: Echo | None
    learns: bool
    sampler: Sampler
    place: int
    root_1: Tensor
    fresh_tokens_A: Tensor
    fresh_aux_AE: Tensor
    history_S: Tensor | None
    tokens: list[int]
    logprobs: list[Tensor] | None
    stats: GenerationStats
    clock: PhaseClock
    noise: Noise | None = None
    retrieved: list[DraftTree] | None = None
    fallbacks: dict[int, Fallback] = field(default_factory=dict)

    def read(self, tokens_A: Tensor) -> None:
        """Tells those who search the request's own text what comes next in it, the prompt first."""
        for text in (self.ngrams, self.echo):
            if text is not None:
                text.read(tokens_A)

    @property
    def shared_noise(self) -> Noise | None:
        """What of it those who propose tokens are told."""
        return self.noise if self.plan.shares_noise else None

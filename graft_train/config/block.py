"""Settings of a block head, within those of the `distill` stage."""

from dataclasses import dataclass

from graft_inference.errors import GraftError

BLOCK_LOSSES = ("cross_entropy", "forward_kl", "reverse_kl", "total_variation", "dspark")
WEIGHTINGS = ("exponential", "d_pace")


@dataclass(slots=True, kw_only=True)
class BlockHeadTrainConfig:
    """What `head.family=block` has of its own; what is not set here (width, heads, RoPE) is the target's.

    Attributes:
        layers: decoder layers of the head.
        block_size: slots of a block, the anchor's included.
        causal: a slot sees only the slots before it, so that a shorter block may be asked for when serving.
        sample_from_anchor: slots predict the token after them (DSpark) and not the one at their own position (DFlash).
        markov_rank: of a bias by the token before (DSpark's vanilla head); 0 for none. Needs sample_from_anchor.
        mask_token_id: what stands in the slots to fill, a token that the target never emits; null: the last id that
            no sample holds.
        anchors: blocks that are trained in a micro-batch, at most.
        loss: cross_entropy on the text's tokens; forward_kl, reverse_kl or total_variation to the target's
            distribution; or dspark, a tenth of the first plus 1.8 times the last.
        weighting: of the drafts of a block: exponential, by their position, or d_pace, by what they add to the expected
            length as the head stands.
        gamma: draft k weighs exp(-(k - 1) / gamma) with weighting=exponential.
        d_pace_share: part of a draft's weight in d_pace that does not depend on the head.
    """

    layers: int = 1
    block_size: int = 8
    causal: bool = True
    sample_from_anchor: bool = False
    markov_rank: int = 0
    mask_token_id: int | None = None
    anchors: int = 512
    loss: str = "cross_entropy"
    weighting: str = "exponential"
    gamma: float = 4.0
    d_pace_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("layers", "anchors", "gamma"):
            if getattr(self, name) <= 0:
                raise GraftError(f"head.block.{name}={getattr(self, name)} must be positive")
        if self.block_size < 2:
            raise GraftError(f"head.block.block_size={self.block_size} drafts nothing; set at least 2")
        if self.markov_rank < 0:
            raise GraftError(f"head.block.markov_rank={self.markov_rank} must not be negative")
        if self.markov_rank and not self.sample_from_anchor:
            raise GraftError(
                f"head.block.markov_rank={self.markov_rank} needs head.block.sample_from_anchor=true: of the engines "
                "vLLM alone has the other"
            )
        for name, choices in {"loss": BLOCK_LOSSES, "weighting": WEIGHTINGS}.items():
            if getattr(self, name) not in choices:
                raise GraftError(f"head.block.{name}={getattr(self, name)} must be one of {', '.join(choices)}")
        if not 0 <= self.d_pace_share <= 1:
            raise GraftError(f"head.block.d_pace_share={self.d_pace_share} must lie between 0 and 1")
        if self.weighting == "d_pace" and self.loss != "cross_entropy":
            raise GraftError(
                "head.block.weighting=d_pace weighs the cross-entropy alone; set head.block.loss=cross_entropy"
            )

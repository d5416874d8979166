"""The RoPE of a head: its target's."""

from typing import Any

from transformers import PreTrainedModel

from graft_inference.errors import GraftError


def head_rope(model: PreTrainedModel) -> dict[str, Any]:
    """RoPE's parameters for a head of this target, of the transformers 5 kind.

    Raises:
        GraftError: the target has no RoPE.
    """
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    # Where layers differ in their RoPE, those that see everything decide: the head does, too.
    rope = rope.get("full_attention", rope)
    if not rope or "rope_type" not in rope:
        raise GraftError(f"{type(model).__name__} has no RoPE, which a draft head needs")
    if rope["rope_type"] == "default" or rope.get("partial_rotary_factor", 1) != 1:
        # The head turns all of its rows, and frequencies that are scaled for a part would not fit.
        return {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return dict(rope)

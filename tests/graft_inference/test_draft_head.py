"""The head's module against the plain one, in every variant; its numbers stay exact."""

import pytest
import torch
from torch.nn import functional as F

from graft_inference.heads.eagle3.checkpoint import load_head, save_head

from .plain_head import COMBINATIONS, PlainHead, varied
from .test_head_checkpoint import make_head

SIZE, STEPS = 6, 4


@pytest.mark.parametrize("changes", COMBINATIONS, ids=lambda changes: "-".join(filter(changes.get, changes)) or "plain")
@torch.inference_mode()
def test_a_chain_of_draft_steps_is_the_plain_one(changes):
    rope = {"rope_type": "default", "rope_theta": 500.0}
    head = varied(make_head(rope_parameters=rope, **changes)).double()
    torch.manual_seed(2)
    embedding = torch.randn(SIZE + STEPS - 1, head.config.hidden_size, dtype=torch.double)
    taps = torch.randn(SIZE, 3 * head.config.hidden_size, dtype=torch.double)
    expected, expected_logits = PlainHead(head).chain(taps, embedding)

    window = head.config.sliding_window or SIZE
    distance = torch.arange(SIZE)[:, None] - torch.arange(SIZE)
    seen, kept = (distance >= 0) & (distance < window), []

    def attend(query, *key_value):
        kept.append(key_value)
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*kept, strict=True))
        mask = seen if len(kept) == 1 else F.pad(seen[-1:], (0, len(kept) - 1), value=True)
        return F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)

    feature = head(embedding[None, :SIZE], head.fuse(taps)[None], torch.arange(SIZE)[None], attend)[:, -1:]
    for step in range(STEPS):
        if step:
            position = torch.tensor([[SIZE - 1 + step]])
            feature = head(embedding[None, position[0]], feature, position, attend)
        # The tables of RoPE are float32.
        torch.testing.assert_close(feature[0, 0], expected[step], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(head.logits(feature)[0, 0], expected_logits[step], atol=1e-5, rtol=1e-5)


def test_positions_stay_exact_in_bf16(tmp_path):
    """Frequencies of bf16 are up to 0.4 % off: at position 1000 whole turns."""
    head = make_head()
    exact = head.rotary_emb.inv_freq.clone()
    half = make_head().to(torch.bfloat16)
    save_head(half, tmp_path)
    meta = make_head().to("meta")
    for served in (half, load_head(tmp_path), make_head().to(device="cpu", dtype=torch.bfloat16).float()):
        assert torch.equal(served.rotary_emb.inv_freq, exact)
    assert load_head(tmp_path).fc.weight.dtype == torch.bfloat16
    assert meta.rotary_emb.inv_freq.is_meta

"""The head's layer against EAGLE-3's, written out row by row with plain products (arXiv 2503.01840; SGLang's)."""

import math

import pytest
import torch
from torch.nn import functional as F

from graft_inference.heads.eagle3.checkpoint import load_head, save_head

from .test_head_checkpoint import make_head

SIZE = 6


def rms_norm(rows, weight, eps):
    return rows / (rows.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def rotated(vector, position, theta):
    """Llama's RoPE: element i turns with element i + half."""
    half = len(vector) // 2
    angles = position * theta ** (-torch.arange(half, dtype=vector.dtype) / half)
    first, second = vector[:half], vector[half:]
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()))


def plain_layer(weights, config, embedding, feature):
    """[S, H]: row t holds the embedding of token t+1 and the feature of position t, and sees rows 0..t."""
    eps, width, theta = config.rms_norm_eps, config.head_dim, config.rope_parameters["rope_theta"]
    normed = rms_norm(feature, weights["midlayer.hidden_norm.weight"], eps)
    own = rms_norm(embedding, weights["midlayer.input_layernorm.weight"], eps)
    both = torch.cat((own, normed), dim=-1)  # EAGLE: the embedding first
    query, key, value = (both @ weights[f"midlayer.self_attn.{name}_proj.weight"].T for name in "qkv")
    groups = config.num_attention_heads // config.num_key_value_heads
    rows = []
    for t in range(len(both)):
        parts = []
        for head in range(config.num_attention_heads):
            mine, theirs = (slice(at * width, (at + 1) * width) for at in (head, head // groups))
            turned = rotated(query[t, mine], t, theta)
            scores = [turned @ rotated(key[s, theirs], s, theta) / math.sqrt(width) for s in range(t + 1)]
            parts.append(torch.stack(scores).softmax(0) @ value[: t + 1, theirs])
        rows.append(torch.cat(parts))
    attended = torch.stack(rows) @ weights["midlayer.self_attn.o_proj.weight"].T
    hidden = attended + (normed if config.norm_before_residual else feature)
    inner = rms_norm(hidden, weights["midlayer.post_attention_layernorm.weight"], eps)
    gate, up, down = (weights[f"midlayer.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return hidden + (F.silu(inner @ gate.T) * (inner @ up.T)) @ down.T


@pytest.mark.parametrize("norm_before_residual", [False, True])
@torch.inference_mode()
def test_a_pass_is_the_papers(norm_before_residual):
    rope = {"rope_type": "default", "rope_theta": 500.0}
    head = make_head(norm_before_residual=norm_before_residual, rope_parameters=rope).double()
    for parameter in head.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.5)
    embedding = torch.randn(SIZE, head.config.hidden_size, dtype=torch.double)
    taps = torch.randn(SIZE, 3 * head.config.hidden_size, dtype=torch.double)
    weights = dict(head.named_parameters())
    expected = plain_layer(weights, head.config, embedding, taps @ weights["fc.weight"].T)

    def attend(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    hidden = head(embedding[None], head.fuse(taps)[None], torch.arange(SIZE)[None], attend)[0]
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)  # the tables of RoPE are float32
    logits = rms_norm(expected, weights["norm.weight"], head.config.rms_norm_eps) @ weights["lm_head.weight"].T
    torch.testing.assert_close(head.logits(hidden), logits, atol=1e-5, rtol=1e-5)


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

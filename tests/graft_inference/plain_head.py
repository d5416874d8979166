"""An EAGLE-3 head row by row with plain products (arXiv 2503.01840, SGLang's; what newer heads add, speculators').

The definition that the module, the drafter and the unroll are compared with. It shares no code with them.
"""

import math
from itertools import product

import torch
from torch.nn import functional as F

WINDOW = 3
"""Shorter than the texts of the tests."""
SWITCHES = ("norm_before_residual", "qk_norm", "norm_output")
COMBINATIONS = [
    dict(zip(SWITCHES, switches, strict=True)) | window | norm
    for switches in product((False, True), repeat=len(SWITCHES))
    for window in ({}, {"sliding_window": WINDOW})
    for norm in ({}, {"norm_before_fc": True}, {"fc_norm": True})
]
SPECULATORS = {
    "norm_before_residual": True,
    "qk_norm": True,
    "sliding_window": WINDOW,
    "norm_before_fc": True,
    "norm_output": True,
}
"""The defaults of speculators 0.9.0, but for the length of the window."""
VARIANTS = {
    "plain": {},
    "a Qwen3 layer": {"qk_norm": True},
    "a window": {"sliding_window": WINDOW},
    "the normed output fed back": {"norm_output": True},
    "a norm before fc": {"norm_before_fc": True, "norm_before_residual": True},
    "EAGLE 3.1": {"fc_norm": True, "norm_output": True},
    "speculators": SPECULATORS,
}


def varied(head):
    """With norms that are not all ones, which would hide where they stand."""
    generator = torch.Generator().manual_seed(7)
    for parameter in head.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.4)
    return head


def rms_norm(rows, weight, eps):
    return rows / (rows.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def rotated(vector, position, theta):
    """Llama's RoPE: element i turns with element i + half."""
    half = len(vector) // 2
    angles = position * theta ** (-torch.arange(half, dtype=vector.dtype) / half)
    first, second = vector[:half], vector[half:]
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()))


class PlainHead:
    def __init__(self, head):
        self.weights, self.config = dict(head.named_parameters()), head.config

    def norm(self, name, rows):
        return rms_norm(rows, self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def feature(self, taps):
        """[H] of the aux hidden states of one position, [E]."""
        if self.config.norm_before_fc:
            taps = self.norm("input_norm", taps)
        if self.config.fc_norm:
            parts = taps.split(self.config.hidden_size)
            taps = torch.cat([self.norm(f"fc_norm.{number}", part) for number, part in enumerate(parts)])
        return self.weights["fc.weight"] @ taps

    def project(self, embedding, feature, position):
        """Queries, keys and values of one row, by head."""
        both = torch.cat(  # EAGLE: the embedding first
            (self.norm("midlayer.input_layernorm", embedding), self.norm("midlayer.hidden_norm", feature))
        )
        theta = self.config.rope_parameters["rope_theta"]
        found = []
        for name in "qkv":
            heads = (self.weights[f"midlayer.self_attn.{name}_proj.weight"] @ both).split(self.config.head_dim)
            if name != "v" and self.config.qk_norm:
                heads = [self.norm(f"midlayer.self_attn.{name}_norm", head) for head in heads]
            found.append(heads if name == "v" else [rotated(head, position, theta) for head in heads])
        return found

    def layer(self, feature, row, seen):
        """[H] of a row that sees others, itself among them."""
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        parts = []
        for number, query in enumerate(row[0]):
            keys, values = (torch.stack([other[kind][number // groups] for other in seen]) for kind in (1, 2))
            parts.append((keys @ query / math.sqrt(self.config.head_dim)).softmax(0) @ values)
        attended = self.weights["midlayer.self_attn.o_proj.weight"] @ torch.cat(parts)
        normed = self.norm("midlayer.hidden_norm", feature)
        hidden = attended + (normed if self.config.norm_before_residual else feature)
        inner = self.norm("midlayer.post_attention_layernorm", hidden)
        gate, up, down = (self.weights[f"midlayer.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return hidden + down @ (F.silu(gate @ inner) * (up @ inner))

    def chain(self, taps, embeddings):
        """A draft from the last position of a text along given tokens.

        Args:
            taps: aux hidden states of the text's T positions, [T, E].
            embeddings: of the tokens behind each position, and of those drafted: [T + steps - 1, H].

        Returns:
            Per step the feature that the next one reads, and logits over the draft vocabulary.
        """
        features = [self.feature(tap) for tap in taps]
        rows = [self.project(embeddings[t], feature, t) for t, feature in enumerate(features)]
        seen = rows[-self.config.sliding_window :] if self.config.sliding_window else rows
        feature, row, outputs, logits = features[-1], rows[-1], [], []
        for position in range(len(taps) - 1, len(embeddings)):
            if position >= len(taps):
                row = self.project(embeddings[position], feature, position)
                seen = [*seen, row]
            hidden = self.layer(feature, row, seen)
            normed = self.norm("norm", hidden)
            feature = normed if self.config.norm_output else hidden
            outputs.append(feature)
            logits.append(self.weights["lm_head.weight"] @ normed)
        return torch.stack(outputs), torch.stack(logits)

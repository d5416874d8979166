"""The block head against its formulas, its context in pieces, its two layouts and what it refuses."""

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from graft_inference.errors import GraftError
from graft_inference.heads.block.config import BlockHeadConfig, default_aux_layer_ids
from graft_inference.heads.block.model import BlockHead
from graft_inference.heads.block.view import SlidingWindow
from graft_inference.heads.families import check_head

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 13,
    "draft_vocab_size": 13,
    "aux_layer_ids": (0, 2),
    "num_target_layers": 5,
    "block_size": 4,
    "mask_token_id": 12,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
}

VIEWS = [
    {},
    {"causal": True},
    {"sliding": SlidingWindow((0, 1), 5)},
    {"causal": True, "sliding": SlidingWindow((1,), 5)},
    {"causal": None, "sliding": SlidingWindow((0,), 2, from_anchor=True)},
    {"causal": True, "sliding": SlidingWindow((0, 1), 2, from_anchor=True)},
]


def block_head(**changes) -> BlockHead:
    torch.manual_seed(0)
    head = BlockHead(BlockHeadConfig(**(SIZES | changes))).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    if head.lm_head is not None:
        head.set_draft_vocabulary(torch.tensor([1, 4, 5, 9, 11]))
    return head.requires_grad_(False)


def inputs(head: BlockHead, tokens: int = 7, slots: int = 4):
    torch.manual_seed(1)
    width = head.config.hidden_size
    aux = torch.randn(1, tokens, len(head.config.aux_layer_ids) * width, dtype=torch.double)
    lm_head = torch.randn(head.config.vocab_size, width, dtype=torch.double)
    return aux, torch.randn(1, slots, width, dtype=torch.double), lm_head


def drafted(head: BlockHead, aux, embedding, lm_head):
    context = head.read_context(aux, torch.arange(aux.shape[1])[None])
    return head.draft_logits(embedding, *context, torch.tensor([aux.shape[1]]), lm_head)


def seen_places(config, layer, slot, tokens, slots):
    """Places of context and block, counted from 0, that a slot sees; the anchor is at `tokens`."""
    sliding = config.sliding
    slides = sliding is not None and layer in sliding.layers
    causal = slides if config.causal is None else config.causal
    first = 0
    if slides:
        first = tokens - sliding.size if sliding.from_anchor else tokens + slot - sliding.size + 1
    return list(range(max(first, 0), tokens + (slot + 1 if causal else slots)))


def plain_logits(head: BlockHead, aux, embedding, lm_head):
    """One slot and one query head at a time, with transformers' norm and MLP."""
    config, weights = head.config, head.state_dict()

    def norm(name, states):
        module = Qwen3RMSNorm(states.shape[-1], config.rms_norm_eps)
        module.weight.data = weights[f"{name}.weight"]
        return module(states)

    def turned(states, position):
        half = config.head_dim // 2
        angles = position * 300.0 ** (-torch.arange(half, dtype=torch.double) / half)
        cos, sin = angles.cos().repeat(2), angles.sin().repeat(2)
        return states * cos + torch.cat([-states[half:], states[:half]]) * sin

    context, tokens = norm("hidden_norm", aux[0] @ weights["fc.weight"].T), aux.shape[1]
    hidden, slots = embedding[0], embedding.shape[1]
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}"
        read = norm(f"{prefix}.input_layernorm", hidden)
        keys, values = (torch.cat([context, read]) @ weights[f"{prefix}.self_attn.{n}_proj.weight"].T for n in "kv")
        attended = torch.zeros(slots, config.num_attention_heads, config.head_dim, dtype=torch.double)
        for slot in range(slots):
            seen = seen_places(config, layer, slot, tokens, slots)
            for query_head in range(config.num_attention_heads):
                part = slice(query_head // 2 * config.head_dim, (query_head // 2 + 1) * config.head_dim)
                own = slice(query_head * config.head_dim, (query_head + 1) * config.head_dim)
                query = (read @ weights[f"{prefix}.self_attn.q_proj.weight"].T)[slot, own]
                query = turned(norm(f"{prefix}.self_attn.q_norm", query), tokens + slot)
                key = [turned(norm(f"{prefix}.self_attn.k_norm", keys[place, part]), place) for place in seen]
                share = (torch.stack(key) @ query / config.head_dim**0.5).softmax(0)
                attended[slot, query_head] = share @ values[seen, part]
        hidden = hidden + attended.flatten(1) @ weights[f"{prefix}.self_attn.o_proj.weight"].T
        mlp = Qwen3MLP(config.qwen3_config()).double()
        names = {f"{n}_proj.weight": weights[f"{prefix}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")}
        mlp.load_state_dict(names)
        hidden = hidden + mlp(norm(f"{prefix}.post_attention_layernorm", hidden))
    rows = weights.get("lm_head.weight", lm_head)
    return norm("norm", hidden)[0 if config.sample_from_anchor else 1 :] @ rows.T


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("changes", [{}, {"sample_from_anchor": True}, {"draft_vocab_size": 5}])
def test_a_block_is_computed_by_its_formulas(views, changes):
    head = block_head(**views, **changes)
    with torch.no_grad():
        logits, expected = drafted(head, *inputs(head)), plain_logits(head, *inputs(head))
    assert logits.shape == (1, head.config.drafts, head.config.draft_vocab_size)
    # RoPE's angles are fp32.
    torch.testing.assert_close(logits[0], expected, atol=1e-5, rtol=1e-5)


def test_a_context_read_in_pieces_is_the_context_read_at_once():
    head = block_head()
    aux, embedding, lm_head = inputs(head)
    places = torch.arange(7)[None]
    pieces = [head.read_context(aux[:, part], places[:, part]) for part in (slice(0, 4), slice(4, 5), slice(5, 7))]
    context = [torch.cat(parts, dim=3) for parts in zip(*pieces, strict=True)]
    got = head.draft_logits(embedding, *context, torch.tensor([7]), lm_head)
    torch.testing.assert_close(got, drafted(head, aux, embedding, lm_head), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("views", [views for views in VIEWS if views.get("causal")])
def test_a_causal_head_may_be_asked_for_a_shorter_block_and_drafts_the_same(views):
    head = block_head(**views)
    aux, embedding, lm_head = inputs(head)
    whole = drafted(head, aux, embedding, lm_head)
    torch.testing.assert_close(drafted(head, aux, embedding[:, :3], lm_head), whole[:, :2], atol=1e-10, rtol=1e-10)


def test_blocks_of_a_length_that_was_not_trained_are_refused():
    for causal, slots, message in ((True, 5, "5 slots was asked.*2 to 4"), (False, 3, "3 slots was asked.*for 4")):
        head = block_head(causal=causal)
        with pytest.raises(GraftError, match=message):
            drafted(head, *inputs(head, slots=slots))


def test_the_markov_bias_is_that_of_the_token_before():
    head = block_head(sample_from_anchor=True, markov_rank=3)
    first, second = head.markov_head.markov_w1.weight, head.markov_head.markov_w2.weight
    torch.testing.assert_close(head.markov_bias(torch.tensor([[2, 7]]))[0, 1], second @ first[7])
    with pytest.raises(GraftError, match="markov_rank=0"):
        block_head().markov_bias(torch.tensor([2]))


def test_ropes_frequencies_stay_exact_in_bf16():
    head = block_head()
    exact = head.rotary_emb.inv_freq.clone()
    assert torch.equal(head.to(torch.bfloat16).rotary_emb.inv_freq, exact)
    assert exact.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": 13}, "mask_token_id=13 must be a whole number from 0 to 12"),
        ({"mask_token_id": True}, "mask_token_id=True"),
        ({"block_size": 1}, "block_size=1"),
        ({"aux_layer_ids": (0, 4)}, "must lie before the target's last layer, 4"),
        ({"aux_layer_ids": (2, 0)}, "distinct and ascending"),
        ({"aux_layer_ids": (-1, 0)}, "counted from 0"),
        ({"draft_vocab_size": 14}, "draft_vocab_size=14 must be a whole number from 1 to 13"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"causal": 1}, "causal=1 must be true or false"),
        ({"causal": None}, "causal=None needs layers with a sliding window"),
        ({"sliding": SlidingWindow((0, 2), 9)}, r"sliding layers \(0, 2\) must be some of 0\.\.1"),
        ({"sliding": SlidingWindow((1, 0), 9)}, r"sliding layers \(1, 0\) must be .* ascending"),
        ({"sliding": SlidingWindow((), 9)}, r"sliding layers \(\) must be"),
        ({"sliding": SlidingWindow((0,), 4)}, "sliding_window=4 must be a whole number from 5"),
        ({"sliding": SlidingWindow((0,), 9, 1)}, "sliding_window_from_anchor=1 must be true or false"),
        ({"sliding": SlidingWindow((0,), 0, True)}, "sliding_window=0 must be a whole number from 1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0"),
        ({"rope_parameters": {"rope_type": "none"}}, "rope_parameters="),
    ],
)
def test_impossible_shapes_are_named(changes, message):
    with pytest.raises(GraftError, match=message):
        BlockHeadConfig(**(SIZES | changes))


def test_a_head_of_another_target_is_named():
    config = block_head().config
    sizes = {"hidden_size": 16, "vocab_size": 13, "num_hidden_layers": 5}
    check_head(config, Qwen3Config(**sizes))
    for name, value, message in (
        ("hidden_size", 32, "hidden_size=16, but the target 32"),
        ("vocab_size", 14, "vocab_size=13, but the target 14"),
        ("num_hidden_layers", 6, "num_target_layers=5, but the target 6"),
    ):
        with pytest.raises(GraftError, match=message):
            check_head(config, Qwen3Config(**(sizes | {name: value})))


@pytest.mark.parametrize(
    ("layers", "expected"), [(36, (1, 9, 17, 25, 33)), (30, (1, 8, 14, 20, 27)), (4, (0, 1, 2)), (3, (0, 1))]
)
def test_aux_layers_are_evenly_spaced_and_never_the_last(layers, expected):
    assert default_aux_layer_ids(layers) == expected

"""Training of a block head: what its slots see, what its drafts are taught, and that it trains what is served."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from graft_inference.errors import GraftError
from graft_inference.heads.block.checkpoint import load_block_head, save_block_head
from graft_inference.heads.block.config import BlockHeadConfig
from graft_inference.heads.block.model import BlockHead
from graft_inference.heads.block.view import SlidingWindow, View
from graft_inference.heads.eagle3.checkpoint import save_head
from graft_inference.heads.eagle3.model import DraftHead
from graft_train.config.block import BlockHeadTrainConfig
from graft_train.config.head import HeadTrainConfig
from graft_train.data.samples import answered, append_samples
from graft_train.data.states import PackedTarget
from graft_train.distill import block as family
from graft_train.distill import distill
from graft_train.distill.batches import PackedBatch
from graft_train.distill.block.attention import flex_attention, merged_attention
from graft_train.distill.block.blocks import draft_blocks
from graft_train.distill.block.layout import make_block_layout
from graft_train.distill.block.strategy import BlockStrategy

from ...graft_inference.test_block_checkpoint import to_speculators
from .pair import VOCAB, WIDTH, samples, tiny_head, tiny_target
from .test_distill import distill_until_killed, make_run, metrics

# Three documents: one answer; two answers; answer from its first token on.
LENGTHS = [9, 12, 6]
ANSWER_S = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1] + [0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1] + [1] * 6, dtype=torch.bool)
START = [0] * 9 + [9] * 12 + [21] * 6
SLOTS = 4


VIEWS = [
    View(causal=False),
    View(causal=True),
    View(causal=True, window=5),
    View(causal=False, window=6),
    View(causal=True, window=2, from_anchor=True),
    View(causal=False, window=3, from_anchor=True),
]
WINDOWS = {
    "full": {},
    "causal": {"causal": True},
    "sliding": {"sliding": SlidingWindow((0, 1), 5)},
    "mixed": {"causal": None, "sliding": SlidingWindow((1,), 3, from_anchor=True)},
}


def layout_of(view=VIEWS[0], drafts=3, anchors=100, seed=0, answer_S=ANSWER_S, lengths=LENGTHS):
    return make_block_layout(lengths, answer_S, SLOTS, drafts, anchors, seed).seen_by(view)


def block_head(seed=1, **changes) -> BlockHead:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": VOCAB,
        "draft_vocab_size": VOCAB,
        "aux_layer_ids": (0, 2),
        "num_target_layers": 4,
        "block_size": SLOTS,
        "mask_token_id": VOCAB - 1,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(seed)
    head = BlockHead(BlockHeadConfig(**(sizes | changes)))
    for parameter in head.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    if head.lm_head is not None:
        head.set_draft_vocabulary(torch.arange(0, VOCAB, 2))
    return head


def reference_mask(layout):
    """[A * P, S + A * P], one query and one key at a time."""
    anchors, tokens = layout.anchors_A.tolist(), len(START)
    mask = torch.zeros(len(anchors) * SLOTS, tokens + len(anchors) * SLOTS, dtype=torch.bool)
    for query in range(mask.shape[0]):
        block, slot = divmod(query, SLOTS)
        for key in range(mask.shape[1]):
            if key < tokens:
                anchor, view = anchors[block], layout.view
                near = view.window is None or (
                    anchor - key <= view.window if view.from_anchor else anchor + slot - key < view.window
                )
                mask[query, key] = START[key] == START[anchor] and key < anchor and near
            else:
                other, place = divmod(key - tokens, SLOTS)
                mask[query, key] = other == block and (place <= slot or not layout.view.causal)
    return mask


def reference_attention(query, context_key, context_value, key, value, layout):
    keys, values = torch.cat([context_key, key], dim=2), torch.cat([context_value, value], dim=2)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=reference_mask(layout), enable_gqa=True)


def test_anchors_are_answer_tokens_with_a_successor_and_a_context():
    layout = layout_of()
    expected = [2, 3, 4, 5, 6, 7] + [10, 11, 12] + [16, 17, 18, 19] + [22, 23, 24, 25]
    assert layout.anchors_A.tolist() == expected
    few = layout_of(anchors=5)
    assert len(few.anchors_A) == 5
    assert set(few.anchors_A.tolist()) < set(expected)
    assert few.anchors_A.tolist() == sorted(few.anchors_A.tolist())
    assert (
        few.anchors_A.tolist()
        == layout_of(anchors=5).anchors_A.tolist()
        != layout_of(anchors=5, seed=1).anchors_A.tolist()
    )
    assert layout.slot_positions_N[:SLOTS].tolist() == [2, 3, 4, 5]
    assert layout.slot_positions_N[6 * SLOTS : 7 * SLOTS].tolist() == [
        1,
        2,
        3,
        4,
    ]  # token 10 is the second of its document


def test_drafts_start_only_where_the_answer_goes_on():
    layout = layout_of()
    for anchor, started in zip(layout.anchors_A.tolist(), layout.started_AK.tolist(), strict=True):
        end = next(
            place for place in range(anchor, 28) if place == 27 or not ANSWER_S[place] or START[place] != START[anchor]
        )
        assert started == [anchor + draft < end for draft in (1, 2, 3)]


def attention_inputs(layout, dtype=torch.float32):
    torch.manual_seed(3)
    slots = len(layout.anchors_A) * SLOTS
    shapes = [(1, 4, slots, 8), (1, 2, len(START), 8), (1, 2, len(START), 8), (1, 2, slots, 8), (1, 2, slots, 8)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def forward_and_gradients(attention, inputs, layout):
    out = attention(*inputs, layout)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return (out, *torch.autograd.grad(out, inputs, upstream))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("anchors", [100, 4])
def test_merged_attention_is_the_reference_forward_and_backward(view, anchors):
    layout = layout_of(view, anchors=anchors)
    inputs = attention_inputs(layout)
    expected = forward_and_gradients(reference_attention, inputs, layout)
    for got, plain in zip(forward_and_gradients(merged_attention, inputs, layout), expected, strict=True):
        torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("view", VIEWS)
def test_flex_attention_is_the_reference_forward(view):
    """Its backward runs on a GPU only."""
    layout = layout_of(view)
    inputs = [tensor.detach() for tensor in attention_inputs(layout)]
    expected = reference_attention(*inputs, layout)
    torch.testing.assert_close(flex_attention(*inputs, layout), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("view", VIEWS)
def test_compiled_flex_attention_is_the_reference(view):
    cpu = layout_of(view)
    layout = cpu.to(torch.device("cuda"))
    inputs = attention_inputs(cpu)
    moved = [tensor.detach().cuda().requires_grad_() for tensor in inputs]
    expected = forward_and_gradients(reference_attention, inputs, cpu)
    for got, plain in zip(forward_and_gradients(flex_attention, moved, layout), expected, strict=True):
        torch.testing.assert_close(got.cpu(), plain, atol=1e-4, rtol=1e-4)


def head_inputs():
    torch.manual_seed(2)
    tokens = len(START)
    return torch.randn(tokens, WIDTH), torch.randn(WIDTH), torch.randn(tokens, 2 * WIDTH)


@pytest.mark.parametrize("causal", [False, True])
def test_no_slot_sees_its_anchors_state_what_comes_after_another_document_or_another_block(causal):
    """Shown by what moves when one token's state, or its embedding, is another."""
    layout, head = layout_of(), block_head(causal=causal)
    embedding_SH, mask_H, aux_SE = head_inputs()
    with torch.no_grad():
        before = draft_blocks(head, embedding_SH, mask_H, aux_SE, layout)
        for token in range(len(START)):
            changed = aux_SE.clone()
            changed[token] += 1
            moved = (draft_blocks(head, embedding_SH, mask_H, changed, layout) - before).abs().amax((1, 2)) > 1e-6
            seen = [START[a] == START[token] and token < a for a in layout.anchors_A.tolist()]
            assert moved.tolist() == seen, token
            changed = embedding_SH.clone()
            changed[token] += 1
            moved = (draft_blocks(head, changed, mask_H, aux_SE, layout) - before).abs().amax((1, 2)) > 1e-6
            assert moved.tolist() == [a == token for a in layout.anchors_A.tolist()], token


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("changes", [{}, {"sample_from_anchor": True, "markov_rank": 3}, {"draft_vocab_size": 16}])
def test_training_logits_are_those_of_inference_behind_a_kept_context(window, changes):
    """The context read token by token, as rounds accept them; the target's own states and embeddings."""
    head, target = block_head(**WINDOWS[window], **changes).eval(), PackedTarget(tiny_target(), (0, 2))
    tokens_S = torch.randint(VOCAB - 1, (len(START),), generator=torch.Generator().manual_seed(4))
    states, layout = target.states(tokens_S, LENGTHS), layout_of(drafts=head.config.drafts)
    embedding_SH = target.embed(tokens_S[None])[0]
    mask_H = target.embed(torch.tensor([[head.config.mask_token_id]]))[0, 0]
    rows_DH = target.lm_head_VH if head.lm_head is None else head.lm_head.weight
    with torch.no_grad():
        trained = draft_blocks(head, embedding_SH, mask_H, states.aux_SE, layout) @ rows_DH.T
        for place, anchor in enumerate(layout.anchors_A.tolist()):
            start = START[anchor]
            pieces = [
                head.read_context(states.aux_SE[None, token : token + 1], torch.tensor([[token - start]]))
                for token in range(start, anchor)
            ]
            context = [torch.cat(parts, dim=3) for parts in zip(*pieces, strict=True)]
            block = torch.cat([embedding_SH[anchor][None], mask_H.expand(SLOTS - 1, -1)])[None]
            served = head.draft_logits(block, *context, torch.tensor([anchor - start]), target.lm_head_VH)
            torch.testing.assert_close(trained[place], served[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 1, "causal": True}, {"sample_from_anchor": True}])
def test_all_blocks_at_once_have_the_gradients_of_each_block_alone(window, changes):
    """Training computes alike slots once and leaves out what nothing reads; a block as it is served does neither."""
    views = WINDOWS[window] if "num_hidden_layers" not in changes else {"sliding": SlidingWindow((0,), 5)}
    head, plain = (block_head(**(views | changes)) for _ in range(2))
    embedding_SH, mask_H, aux_SE = head_inputs()
    layout = layout_of(drafts=head.config.drafts)
    rows_DH = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(3))
    logits = draft_blocks(head, embedding_SH, mask_H, aux_SE, layout) @ rows_DH.T
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)) / layout.started_AK.numel()
    (logits * upstream).sum().backward()
    for place, anchor in enumerate(layout.anchors_A.tolist()):
        start = START[anchor]
        context = plain.read_context(aux_SE[None, start:anchor], torch.arange(anchor - start)[None])
        block = torch.cat([embedding_SH[anchor][None], mask_H.expand(SLOTS - 1, -1)])[None]
        served = plain.draft_logits(block, *context, torch.tensor([anchor - start]), rows_DH)
        (served[0] * upstream[place]).sum().backward()
    for (name, got), wanted in zip(head.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, atol=1e-5, rtol=1e-5, msg=name)


def strategy(**block) -> BlockStrategy:
    settings = HeadTrainConfig(family="block", block=BlockHeadTrainConfig(block_size=SLOTS, **block))
    return BlockStrategy(block_head(), PackedTarget(tiny_target(), (0, 2)), settings)


def test_a_steps_weights_fall_by_place_and_sum_to_one():
    trained_K = torch.tensor([10, 8, 4])
    coefficient_K = strategy(gamma=2.0).coefficients(trained_K)
    torch.testing.assert_close(coefficient_K / coefficient_K[0], torch.tensor([1, math.exp(-0.5), math.exp(-1)]))
    assert (coefficient_K * trained_K).sum().item() == pytest.approx(1)
    even = strategy(weighting="d_pace").coefficients(trained_K)
    torch.testing.assert_close(even, torch.full((3,), 1 / 22))


def test_a_batch_without_anchors_trains_nothing_and_does_not_fail():
    trained = strategy()
    batch = PackedBatch([0], [5], torch.arange(5), torch.zeros(5, dtype=torch.bool))
    prepared = trained.prepare(batch, trained.target.states(batch.tokens_S, [5]), seed=0)
    embedding_SH = trained.target.embed(batch.tokens_S[None])[0]
    loss, _ = trained(prepared, embedding_SH, trained.coefficients(prepared.trained_K))
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in trained.head.parameters())


BLOCK = {"family": "block", "aux_layer_ids": [0, 2], "draft_vocab_size": VOCAB}
SHAPE = {"block_size": SLOTS, "anchors": 16}
PATTERN = [3, 7, 1, 9, 4]


def block_run(directory, block=None, **changes):
    return make_run(directory, **(BLOCK | {"block": SHAPE | (block or {})} | changes))


@pytest.mark.parametrize(
    "block",
    [
        {},
        {"loss": "forward_kl", "causal": False},
        {"loss": "dspark", "sample_from_anchor": True, "markov_rank": 4},
        {"weighting": "d_pace"},
    ],
)
def test_a_run_writes_a_head_that_learned_and_measures_it_in_the_engine(tmp_path, block):
    directory = distill(block_run(tmp_path, block, epochs=20, measure_tokens=6))
    head = load_block_head(directory)
    assert (head.config.block_size, head.config.aux_layer_ids) == (SLOTS, (0, 2))
    assert head.config.causal is block.get("causal", True)
    assert head.config.mask_token_id not in {token for sample in samples(30) for token in sample.ids}
    curve = metrics(directory)
    assert sum(sum(line["loss"]) for line in curve[-5:]) < 0.9 * sum(sum(line["loss"]) for line in curve[:5])
    summary = json.loads((directory / "training.json").read_text())
    assert summary["validation"]["acceptance_length"] >= 1
    assert summary["measured_acceptance_length"] >= 1


def test_a_repeating_pattern_is_learned_to_full_acceptance(tmp_path):
    """Each token of the pattern has one successor, so every block can be drafted whole."""
    config = block_run(
        tmp_path, {"anchors": 200}, max_steps=60, epochs=100, learning_rate=1e-2, batch_tokens=240, clip=10.0
    )
    tiny_target(hidden_size=64).save_pretrained(config.target.name_or_path)
    texts = [[PATTERN[(start + place) % 5] for place in range(24)] for start in range(5)] * 4
    with (Path(config.run_dir) / "data" / "samples.jsonl").open("wb") as file:
        append_samples(file, [answered(f"p{n}", text[:4], text[4:], {}) for n, text in enumerate(texts)])
    head = load_block_head(distill(config))
    target, masks = PackedTarget(tiny_target(hidden_size=64), (0, 2)), [head.config.mask_token_id] * (SLOTS - 1)
    for text in texts[:5]:
        keys, values = head.read_context(target.states(torch.tensor(text), [24]).aux_SE[None], torch.arange(24)[None])
        for anchor in range(4, 20):
            context = keys[:, :, :, :anchor], values[:, :, :, :anchor]
            block = target.embed(torch.tensor([[text[anchor], *masks]]))
            drafts = head.draft_logits(block, *context, torch.tensor([anchor]), target.lm_head_VH).argmax(-1)[0]
            assert drafts.tolist() == text[anchor + 1 : anchor + SLOTS]


def test_bf16_and_stored_logits_train(tmp_path):
    changes = {"mixed_precision": "bf16", "states": "disk", "states_top_k": 8, "epochs": 20}
    curve = metrics(distill(block_run(tmp_path, {"loss": "forward_kl", "causal": False}, **changes)))
    assert sum(sum(line["loss"]) for line in curve[-5:]) < 0.9 * sum(sum(line["loss"]) for line in curve[:5])


@pytest.mark.parametrize(("killed_after", "states"), [(2, "online"), (4, "disk")])
def test_killed_and_run_again_equals_no_interruption(tmp_path, monkeypatch, killed_after, states):
    whole = distill(block_run(tmp_path / "whole", states=states))
    config = block_run(tmp_path / "killed", states=states)
    distill_until_killed(config, killed_after, monkeypatch)
    resumed = distill(config)
    assert metrics(resumed) == metrics(whole)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_one_set_of_states_trains_both_families(tmp_path, monkeypatch):
    config = make_run(tmp_path, states="disk", max_steps=2, aux_layer_ids=[0, 2])
    distill(config).rename(tmp_path / "run" / "eagle3")
    monkeypatch.setattr(PackedTarget, "states", None)
    assert load_block_head(distill(block_run(tmp_path, states="disk", max_steps=2)))


def test_a_published_block_head_is_gone_on_from(tmp_path):
    first = distill(block_run(tmp_path, epochs=20))
    second = block_run(tmp_path / "again", {"block_size": 7}, init_from=str(first), learning_rate=1e-6)
    head = load_block_head(distill(second))
    assert head.config.block_size == SLOTS
    assert sum(metrics(Path(second.run_dir) / "head")[0]["loss"]) < 0.9 * sum(metrics(first)[0]["loss"])


def test_a_head_of_speculators_is_gone_on_from(tmp_path):
    """With its windows, in which it is then trained."""
    window = SlidingWindow((1,), 3, from_anchor=True)
    head = block_head(mask_token_id=family.mask_token(samples(30), VOCAB, None), causal=None, sliding=window)
    save_block_head(head, tmp_path / "published")
    to_speculators(tmp_path / "published")
    trained = load_block_head(distill(block_run(tmp_path, init_from=str(tmp_path / "published"), max_steps=1)))
    assert trained.config == head.config
    assert not torch.equal(trained.fc.weight, head.fc.weight)


def test_of_an_eagle3_head_a_new_head_takes_the_layers_and_their_projection(tmp_path):
    eagle3 = DraftHead(replace(tiny_head().config, aux_layer_ids=(0, 1, 2)))
    save_head(eagle3, tmp_path)
    settings = HeadTrainConfig(family="block", init_from=str(tmp_path), draft_vocab_size=VOCAB)
    trained = family.make_strategy(tiny_target(), samples(30), settings)
    assert trained.head.config.aux_layer_ids == trained.target.aux_layer_ids == eagle3.config.aux_layer_ids
    assert torch.equal(trained.head.fc.weight, eagle3.fc.weight)
    with pytest.raises(GraftError, match=r"head\.aux_layer_ids=\[0\], but the EAGLE-3 head of head\.init_from reads"):
        family.make_strategy(tiny_target(), samples(30), replace(settings, aux_layer_ids=[0]))
    save_head(tiny_head(), tmp_path)
    with pytest.raises(GraftError, match=r"aux_layer_ids=\[0, 2, 3\]: the target has layers 0\.\.3, of which a block"):
        family.make_strategy(tiny_target(), samples(30), settings)


def test_heads_are_saved_in_the_targets_dtype(tmp_path):
    config = block_run(tmp_path, max_steps=1, epochs=1)
    config.target.dtype = "bfloat16"
    assert load_block_head(distill(config)).fc.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "block", "message"),
    [
        ({"aux_layer_ids": [0, 3]}, {}, r"head.aux_layer_ids=\[0, 3\].*all but the last"),
        (
            {},
            {"mask_token_id": VOCAB},
            f"mask_token_id={VOCAB} lies outside the target's vocabulary of {VOCAB}",
        ),
        ({}, {"mask_token_id": 3}, "head.block.mask_token_id=3 is a token that samples hold"),
    ],
)
def test_heads_that_cannot_be_trained_are_refused_and_nothing_is_left(tmp_path, changes, block, message):
    config = block_run(tmp_path, block, **changes)
    with pytest.raises(GraftError, match=message):
        distill(config)
    assert not (Path(config.run_dir) / "head").exists()


def test_a_target_without_a_token_to_spare_is_named():
    everything = [answered("all", list(range(VOCAB)), [1, 2], {})]
    with pytest.raises(GraftError, match=f"samples hold all {VOCAB} tokens"):
        family.mask_token(everything, VOCAB, None)
    assert family.mask_token(samples(), VOCAB + 2, None) == VOCAB + 1


def test_a_head_of_another_target_is_not_gone_on_from(tmp_path):
    save_block_head(block_head(num_target_layers=9), tmp_path / "head")
    with pytest.raises(GraftError, match=r"head.init_from=.*num_target_layers=9, but the target 4"):
        distill(block_run(tmp_path, init_from=str(tmp_path / "head")))


def test_a_head_whose_mask_the_target_emits_is_not_gone_on_from(tmp_path):
    save_block_head(block_head(mask_token_id=3), tmp_path / "head")
    with pytest.raises(GraftError, match=r"mask_token_id of head\.init_from=.*=3 is a token that samples hold"):
        distill(block_run(tmp_path, init_from=str(tmp_path / "head")))


def test_a_head_with_an_lm_head_of_its_own_is_not_gone_on_from(tmp_path):
    free = family.mask_token(samples(30), VOCAB, None)
    save_block_head(block_head(mask_token_id=free), tmp_path / "head")
    path, lm_head_VH = tmp_path / "head" / "model.safetensors", tiny_target().get_output_embeddings().weight
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": lm_head_VH}, path)
    distill(block_run(tmp_path / "first", init_from=str(path.parent), max_steps=1))
    save_file(tensors | {"lm_head.weight": lm_head_VH + 1}, path)
    with pytest.raises(GraftError, match=r"head\.init_from has lm_head of its own"):
        distill(block_run(tmp_path / "second", init_from=str(path.parent), max_steps=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "head.block.layers=0 must be positive"),
        ({"block_size": 1}, "head.block.block_size=1 drafts nothing"),
        ({"markov_rank": -1}, "head.block.markov_rank=-1"),
        ({"markov_rank": 4}, "head.block.markov_rank=4 needs head.block.sample_from_anchor=true"),
        ({"loss": "survival"}, "head.block.loss=survival must be one of cross_entropy"),
        ({"weighting": "even"}, "head.block.weighting=even must be one of exponential"),
        ({"gamma": 0.0}, "head.block.gamma=0.0 must be positive"),
        ({"d_pace_share": 1.5}, "head.block.d_pace_share=1.5"),
        ({"weighting": "d_pace", "loss": "dspark"}, "set head.block.loss=cross_entropy"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(GraftError, match=message):
        BlockHeadTrainConfig(**changes)


def test_a_loss_that_needs_all_logits_is_refused_where_some_are_stored():
    block = BlockHeadTrainConfig(loss="reverse_kl")
    with pytest.raises(GraftError, match=r"head\.block\.loss=reverse_kl is infinite"):
        HeadTrainConfig(family="block", block=block, states="disk", states_top_k=8)
    assert HeadTrainConfig(family="block", loss="reverse_kl", states="disk", states_top_k=8)


def test_an_unknown_family_is_named():
    with pytest.raises(GraftError, match=r"head\.family=medusa must be one of eagle3, block"):
        HeadTrainConfig(family="medusa")

"""A block head in the engine: its trees against plain ones, and output that stays the target's."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft_inference import METHODS, GraftEngine, GraftError, paper_policy
from graft_inference.bundle import Bundle, load_bundle
from graft_inference.heads.block.checkpoint import save_block_head
from graft_inference.heads.block.config import BlockHeadConfig
from graft_inference.heads.block.model import BlockHead
from graft_inference.heads.block.view import SlidingWindow
from graft_inference.heads.families import load_any_head
from graft_inference.noise import Noise
from graft_inference.retrieval.successor_matrix import SuccessorMatrix

from .test_engine import prompt
from .tiny import learned_policy, tiny_engine, tiny_model, tiny_policy, told_policy

SMALL, BLOCK = 8, 5
LAYOUTS = {
    "fill-in": {"block_size": BLOCK},
    "causal": {"block_size": BLOCK, "causal": True},
    "next token": {"block_size": BLOCK - 1, "sample_from_anchor": True},
    "markov": {"block_size": BLOCK - 1, "sample_from_anchor": True, "markov_rank": 3},
    "reduced": {"block_size": BLOCK, "draft_vocab_size": SMALL - 1},
    "markov fill-in": {"block_size": BLOCK, "markov_rank": 3},
    "sliding": {"block_size": BLOCK, "causal": True, "sliding": SlidingWindow((0, 1), BLOCK + 1)},
    "mixed": {"block_size": BLOCK, "causal": None, "sliding": SlidingWindow((1,), 3, from_anchor=True)},
}


def tiny_block_head(model, **changes) -> BlockHead:
    torch.manual_seed(1)
    config = model.config
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.vocab_size,
        "aux_layer_ids": (0, 2),
        "num_target_layers": config.num_hidden_layers,
        "mask_token_id": config.vocab_size - 1,
        "max_position_embeddings": 256,
    }
    head = BlockHead(BlockHeadConfig(**(sizes | changes)))
    if head.lm_head is not None:
        head.set_draft_vocabulary(torch.randperm(SMALL)[: head.config.draft_vocab_size].sort().values)
    for parameter in head.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return head.eval().requires_grad_(False)


def block_engine(policy=None, model=None, layout="fill-in", **settings) -> GraftEngine:
    model = model or tiny_model("llama", vocab_size=SMALL)
    head = tiny_block_head(model, **LAYOUTS[layout])
    return tiny_engine(model, policy or tiny_policy(0.5), head, **settings)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_a_block_behind_a_context_has_the_logits_of_its_head(layout):
    engine = block_engine(layout=layout)
    proposer, head = engine.speculator.head, engine.head
    aux = torch.randn((6, head.fc.in_features), generator=torch.Generator().manual_seed(3))
    state, root = proposer.open(3, 0, 20), torch.tensor([4])
    (draft,) = proposer.begin([state], [(torch.zeros(6, dtype=torch.long), aux)], [root], [None])
    context = head.read_context(aux[None], torch.arange(6)[None])
    tokens = torch.tensor([[4, *[head.config.mask_token_id] * (head.config.block_size - 1)]])
    lm_head = engine.target.model.get_output_embeddings().weight
    expected = head.draft_logits(engine.target.embed(tokens), *context, torch.tensor([6]), lm_head)[0]
    torch.testing.assert_close(draft.logits_KD, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_a_causal_head_is_asked_for_no_more_slots_than_the_plan_has_steps(layout):
    """Two requests of different plans, in one pass: each has the first drafts of the whole block."""
    engine = block_engine(layout=layout)
    proposer, head = engine.speculator.head, engine.head
    generator = torch.Generator().manual_seed(3)
    fresh = [(torch.zeros(5, dtype=torch.long), torch.randn((5, head.fc.in_features), generator=generator))] * 3
    states = [proposer.open(2, num_steps, 20) for num_steps in (0, 2, 1)]
    whole, *shorter = proposer.begin(states, fresh, [torch.tensor([4])] * 3, [None] * 3)
    assert len(whole.logits_KD) == head.config.drafts
    assert [len(one.logits_KD) for one in shorter] == ([2, 1] if head.config.causal else [head.config.drafts] * 2)
    for one in shorter:
        torch.testing.assert_close(one.logits_KD, whole.logits_KD[: len(one.logits_KD)], atol=1e-4, rtol=1e-4)
    proposer.resume(states[1], 5, 2, 3, 20)
    assert states[1].slots == (3 + head.config.first_slot if head.config.causal else head.config.block_size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", [tiny_policy, learned_policy])
def test_greedy_output_is_the_targets_whatever_the_method(policy, layout):
    engine = block_engine(policy(0.5), layout=layout)
    drafted = 0
    for seed in range(3):
        ids = prompt(9 + seed, seed, SMALL)
        expected = engine.generate(ids, 30, method="autoregressive").sequences
        with engine.target.own_attention() as model:
            assert model.generate(ids, max_new_tokens=30, do_sample=False).tolist() == expected.tolist()
        for method in METHODS:
            out = engine.generate(ids, 30, method=method)
            assert out.sequences.tolist() == expected.tolist()
            drafted += out.stats.accepted["drafted"]
    assert drafted, "a head whose drafts are never right shows nothing"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_seed_gives_one_text_whatever_the_method(layout):
    engine = block_engine(told_policy(0.5), layout=layout)
    ids = prompt(7, 0, SMALL)
    for seed in range(3):
        expected = engine.generate(ids, 20, 1.0, "autoregressive", seed=seed).sequences
        for method in METHODS:
            assert engine.generate(ids, 20, 1.0, method, seed=seed).sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("layout", ["fill-in", "markov"])
def test_prompts_decoded_together_get_what_they_get_alone(layout):
    engine = block_engine(learned_policy(0.5), layout=layout)
    prompts = [prompt(length, length, SMALL)[0] for length in (5, 11, 8)]
    together = engine.generate(prompts, 20, pad_token_id=0)
    for index, one in enumerate(prompts):
        alone = engine.generate(one, 20)
        assert together.sequences[index, -20:].tolist() == alone.sequences[0, -20:].tolist()
        assert together.each[index].accepted == alone.stats.accepted


def test_the_turns_of_a_chat_keep_what_the_head_has_read():
    kept, fresh = block_engine(), block_engine()
    kept.keep_prefix = True
    ids = prompt(9, 0, SMALL)
    for turn in range(3):
        out, expected = kept.generate(ids, 12), fresh.generate(ids, 12)
        assert out.sequences.tolist() == expected.sequences.tolist()
        assert (out.stats.reused > 0) == (turn > 0)
        ids = torch.cat((out.sequences, prompt(4, turn, SMALL)), dim=1)


@torch.inference_mode()
def test_told_noise_a_slot_proposes_what_will_be_drawn():
    engine = block_engine()
    proposer, aux = engine.speculator.head, torch.randn(4, 2 * 32)
    noise = Noise(torch.randn(6, SMALL), 0.8)
    state, root = proposer.open(2, 3, 20), torch.tensor([1])
    (draft,) = proposer.begin([state], [(torch.zeros(4, dtype=torch.long), aux)], [root], [noise])
    told = draft.logits_KD[0] / 0.8 + noise.gumbel_PV[0]
    assert draft.layers[0].tokens_C.tolist() == told.topk(2).indices.tolist()


def test_a_plan_deeper_than_the_block_is_refused_before_anything_runs():
    engine = block_engine(paper_policy(3, 12, 6, 3))
    with pytest.raises(GraftError, match=r"drafts 6 tokens in a row, but the head's blocks have 4: .*num_steps=4"):
        engine.generate(prompt(5, 0, SMALL), 8, method="eagle3")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bare_checkpoint_of_any_family_is_served(tmp_path, layout):
    model = tiny_model("llama", vocab_size=SMALL)
    head = tiny_block_head(model, **LAYOUTS[layout])
    save_block_head(head, tmp_path)
    assert isinstance(load_any_head(tmp_path), BlockHead)
    bundle = load_bundle(tmp_path, model.config, None)
    engine = GraftEngine.from_bundle(bundle, model, fallback=False)
    assert engine.policy.eagle3.num_steps == head.config.drafts == 4
    expected = engine.generate(prompt(6, 0, SMALL), 20, method="autoregressive").sequences
    out = engine.generate(prompt(6, 0, SMALL), 20)
    assert out.sequences.tolist() == expected.tolist()
    assert set(out.stats.checkpoints) - {"none"}


def test_it_is_not_served_beside_a_target_of_other_sizes(tmp_path):
    save_block_head(tiny_block_head(tiny_model("llama", vocab_size=SMALL), **LAYOUTS["fill-in"]), tmp_path)
    with pytest.raises(GraftError, match="the head has vocab_size=8, but the target 9"):
        load_bundle(tmp_path, tiny_model("llama", vocab_size=9).config, None)
    bundle = Bundle(
        load_any_head(tmp_path), replace(tiny_policy()), SuccessorMatrix.empty(SMALL, 4, torch.device("cpu"))
    )
    with pytest.raises(GraftError, match=r"the target has layers 0\.\.1; a head that reads others"):
        GraftEngine.from_bundle(bundle, tiny_model("llama", vocab_size=SMALL, num_hidden_layers=2))


@torch.inference_mode()
def block_logits(engine: GraftEngine) -> torch.Tensor:
    """Of the drafts behind a made-up context."""
    aux = torch.randn((6, engine.head.fc.in_features), generator=torch.Generator().manual_seed(3))
    state = engine.speculator.head.open(3, 3, 20)
    fresh = [(torch.zeros(6, dtype=torch.long), aux)]
    return engine.speculator.head.begin([state], fresh, [torch.tensor([4])], [None])[0].logits_KD


def test_embeddings_and_lm_head_of_its_own_are_read_and_copies_of_the_targets_are_dropped(tmp_path):
    """DeepSpec's heads bring both."""
    model, ids = tiny_model("llama", vocab_size=SMALL), prompt(6, 0, SMALL)
    save_block_head(tiny_block_head(model, **LAYOUTS["fill-in"]), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    copies = {
        "embed_tokens.weight": model.get_input_embeddings().weight,
        "lm_head.weight": model.get_output_embeddings().weight,
    }

    def engine_of(more):
        save_file(tensors | more, tmp_path / "model.safetensors")
        target = tiny_model("llama", vocab_size=SMALL)
        return GraftEngine.from_bundle(load_bundle(tmp_path, target.config, None), target, fallback=False)

    plain, copied = engine_of({}), engine_of(copies)
    assert (copied.head.embed_tokens, copied.head.lm_head) == (None, None)
    assert torch.equal(block_logits(copied), block_logits(plain))
    with_lm_head = engine_of({"lm_head.weight": -copies["lm_head.weight"]})
    torch.testing.assert_close(block_logits(with_lm_head), -block_logits(plain))
    swapped = copies["embed_tokens.weight"].clone()
    swapped[[4, 5]] = swapped[[5, 4]]
    with_embeddings = engine_of({"embed_tokens.weight": swapped})
    assert not torch.allclose(block_logits(with_embeddings), block_logits(plain))
    for engine in (with_lm_head, with_embeddings):
        assert engine.generate(ids, 20).sequences.tolist() == plain.generate(ids, 20).sequences.tolist()

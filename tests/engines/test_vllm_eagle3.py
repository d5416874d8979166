"""EAGLE-3 heads in the dialect of speculators, in vLLM: it drafts what our engine drafts.

The heads are random. In a vocabulary of so few tokens the target accepts many of their drafts by chance, and a head
that is computed otherwise has other ones accepted.
"""

import pytest
import torch

from graft_inference import QuotaCheckpoint, QuotaPlan
from graft_inference.heads.eagle3.checkpoint import save_head
from tests.graft_inference.plain_head import SPECULATORS, VARIANTS, varied
from tests.graft_inference.tiny import tiny_engine, tiny_head, tiny_model

from .environments import run_vllm

pytestmark = pytest.mark.engines("vllm")

VOCAB, NEW_TOKENS, STEPS = 6, 40, 3
PROMPTS = torch.randint(VOCAB, (12, 7), generator=torch.Generator().manual_seed(3))
# vLLM has heads of 32 at least on a CPU.
SHAPE = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
# Windows count from another position in vLLM: this one hides nothing.
HEADS = {"EAGLE 3.1": VARIANTS["EAGLE 3.1"], "speculators": SPECULATORS | {"sliding_window": 128}}


@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS)
def test_as_many_drafts_are_accepted_as_in_our_engine(tmp_path, changes):
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 64, "vocab_size": VOCAB}
    model = tiny_model("llama", **sizes)
    model.save_pretrained(tmp_path / "target")
    head = random_head(model, changes)
    save_head(head, tmp_path / "head")
    speculative = {"method": "eagle3", "model": str(tmp_path / "head"), "num_speculative_tokens": STEPS}
    theirs = run_vllm(
        tmp_path,
        target=str(tmp_path / "target"),
        prompts=PROMPTS.tolist(),
        max_tokens=NEW_TOKENS,
        speculative_config=speculative,
    )
    tokens, rounds, accepted = drafted(tiny_engine(model, head=head))
    assert theirs["tokens"] == tokens
    assert (theirs["drafts"], theirs["accepted_per_position"]) == (rounds, accepted)
    assert accepted[0] > 50
    assert accepted[2] > 0


def random_head(model, changes):
    """Of a seed that happens to draft well."""
    shape = {"draft_vocab_size": VOCAB - 1, "aux_layer_ids": (0, 1, 2), **SHAPE}
    head = varied(tiny_head(model, seed=4, **shape, **changes))
    for parameter in head.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(0.25)
    return head


def drafted(engine):
    """New tokens, rounds and accepted drafts by depth; of a last round even those behind the tokens asked for."""
    plan = QuotaPlan((QuotaCheckpoint(STEPS, drafted=STEPS),), topk=1)
    tokens, rounds, accepted = [], 0, [0] * STEPS
    for prompt in PROMPTS:
        out = engine.generate(prompt, NEW_TOKENS + STEPS, plan=plan)
        tokens.append(out.sequences[0, len(prompt) :][:NEW_TOKENS].tolist())
        emitted, depth = 1, 0
        for source in out.stats.sources[1:]:
            emitted += 1
            if source == "drafted":
                accepted[depth] += 1
                depth += 1
                continue
            rounds, depth = rounds + 1, 0
            if emitted >= NEW_TOKENS:
                break
    return tokens, rounds, accepted

"""A tiny random target with a random head, and samples by hand."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft_inference.heads.eagle3.model import DraftHead, DraftHeadConfig
from graft_train.data.samples import Sample, answered

VOCAB, WIDTH = 31, 16


def tiny_target(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    return model.eval().requires_grad_(False)


def tiny_head(kept: list[int] | None = None, **changes) -> DraftHead:
    torch.manual_seed(1)
    kept = kept or list(range(0, VOCAB, 2))
    head = DraftHead(
        DraftHeadConfig(
            hidden_size=WIDTH,
            intermediate_size=20,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            vocab_size=VOCAB,
            draft_vocab_size=len(kept),
            aux_layer_ids=(0, 2, 3),
            max_position_embeddings=64,
            **changes,
        )
    )
    head.set_draft_vocabulary(torch.tensor(kept))
    return head


def samples(count: int = 12) -> list[Sample]:
    """Of unequal lengths, the answers drawn from a third of the vocabulary."""
    generator = torch.Generator().manual_seed(2)

    def ids(high: int, length: int) -> list[int]:
        return torch.randint(1, high, (length,), generator=generator).tolist()

    return [answered(f"s{n}", ids(VOCAB, 2 + n % 3), ids(VOCAB // 3, 5 + n % 4), {}) for n in range(count)]

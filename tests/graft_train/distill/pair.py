"""A tiny random target with a random head, and samples by hand."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft_inference.heads.eagle3.model import DraftHead, DraftHeadConfig
from graft_train.data.samples import Sample, answered
from graft_train.distill.eagle3.layout import Layout
from tests.graft_inference.plain_head import PlainHead

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


def plain_unroll(head: DraftHead, embedding_SH, aux_SE, layout: Layout, steps: int) -> list[torch.Tensor]:
    """What `unroll` returns, by the plain head's chains from every column; zeros beyond the end of its document."""
    first_S = torch.arange(len(aux_SE)) - layout.positions_S
    rows = []
    for column in layout.columns_C.tolist():
        first = int(first_S[column])
        inside = min(steps, first + layout.lengths[int(layout.document_S[column])] - 1 - column)
        read_NH = embedding_SH[first + 1 : column + 1 + inside]
        outputs, _ = PlainHead(head).chain(aux_SE[first : column + 1], read_NH)
        rows.append(torch.cat((outputs, outputs.new_zeros(steps - inside, outputs.shape[1]))))
    return list(torch.stack(rows, dim=1))


def samples(count: int = 12) -> list[Sample]:
    """Of unequal lengths, the answers drawn from a third of the vocabulary."""
    generator = torch.Generator().manual_seed(2)

    def ids(high: int, length: int) -> list[int]:
        return torch.randint(1, high, (length,), generator=generator).tolist()

    return [answered(f"s{n}", ids(VOCAB, 2 + n % 3), ids(VOCAB // 3, 5 + n % 4), {}) for n in range(count)]

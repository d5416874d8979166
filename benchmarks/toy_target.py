"""A small target where none can be had: a Llama of this machine's Python sources, for `gpu_road.py`."""

from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"
FILES, CONTEXT = 2000, 256


def toy_target(directory: Path, sources: str, device: str, steps: int = 1500, batch: int = 64) -> Path:
    """Trains it for so many steps of [batch, CONTEXT] tokens, or finds it there.

    The model has 16 million parameters and 4096 tokens; a run of a few steps is one of noise.
    """
    if (directory / "config.json").exists():
        return directory
    paths = sorted(Path(sources).rglob("*.py"))
    chosen = paths[:: max(1, len(paths) // FILES)]
    texts = [path.read_text(encoding="utf-8", errors="ignore")[:20_000] for path in chosen]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=4096, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END)
    tokens_S = torch.tensor([token for one in bpe.encode_batch(texts) for token in (*one.ids, 0)], device=device)
    model = train(tokens_S, steps, batch)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def train(tokens_S: Tensor, steps: int, batch: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        max_position_embeddings=2048, bos_token_id=None, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(tokens_S.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps + 1, pct_start=0.1)
    place_C = torch.arange(CONTEXT, device=tokens_S.device)
    for step in range(steps):
        starts_B1 = torch.randint(len(tokens_S) - CONTEXT, (batch, 1), device=tokens_S.device)
        ids_BC = tokens_S[starts_B1 + place_C]
        with torch.autocast(tokens_S.device.type, torch.bfloat16):
            loss = model(input_ids=ids_BC, labels=ids_BC).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if not step % 250 or step + 1 == steps:
            print(f"toy target: step {step}, loss {loss.item():.2f}", flush=True)
    return model.cpu()

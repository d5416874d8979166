"""A tiny target and heads that the project's own stages train on its answers and export: they draft well."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from graft_inference import GraftEngine, QuotaCheckpoint, QuotaPlan, paper_policy
from graft_train.config import Config
from graft_train.config.block import BlockHeadTrainConfig
from graft_train.config.head import HeadTrainConfig
from graft_train.config.target import TargetConfig
from graft_train.data.samples import answered, append_samples
from graft_train.distill import distill
from graft_train.export import export
from graft_train.files import write_json

from ..graft_inference.tiny_bundle import tiny_successors, tiny_tokenizer

VOCAB, LAYERS, NEW_TOKENS = 64, 6, 40
PROMPTS = torch.randint(VOCAB - 2, (100, 6), generator=torch.Generator().manual_seed(3))
SERVED = PROMPTS[:16]
"""Prompts that no head was trained on."""
LETTER = {"drafted": "d", "bonus": "b"}
TRAINING = {
    "epochs": 100,
    "max_steps": 200,
    "batch_tokens": 1024,
    "batches_per_step": 1,
    "learning_rate": 3e-3,
    "mixed_precision": "no",
    "log_every": 200,
    "validation_samples": 1,
    "measure_prompts": 1,
    "trackers": [],
}


def write_target(directory: Path) -> LlamaForCausalLM:
    """A random target with heads of 32, the narrowest that vLLM has on a CPU, and answers that can be learned."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    # A token's likeliest successor is another one; what came before changes that now and then.
    model.model.embed_tokens.weight.data.mul_(5)
    order = torch.randperm(VOCAB - 2, generator=torch.Generator().manual_seed(1))
    model.lm_head.weight.data[order] = model.model.embed_tokens.weight.data[: VOCAB - 2]
    model.lm_head.weight.data[VOCAB - 2 :] = 0  # never the likeliest: the end of a text, and the mask of a block head
    model.save_pretrained(directory)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>", "eos_token": "<eos>"})
    assert tokenizer.eos_token_id == VOCAB - 2  # which is never written, so no text ends
    tokenizer.save_pretrained(directory)
    return model.eval().requires_grad_(False)


def greedy(model: LlamaForCausalLM, prompts: Tensor) -> list[list[int]]:
    """The new tokens of transformers' own `generate`."""
    return model.generate(prompts, max_new_tokens=NEW_TOKENS, do_sample=False)[:, prompts.shape[1] :].tolist()


def write_bundle(run_dir: Path, target: Path, model: LlamaForCausalLM, **head: Any) -> Path:
    """Trains a head on the answers to all prompts but `SERVED`, and exports it.

    Args:
        head: settings of it.
    """
    block = BlockHeadTrainConfig(**head.pop("block", {}))
    config = Config(
        run_dir=str(run_dir),
        threads=1,
        target=TargetConfig(str(target), dtype="float32", device="cpu"),
        head=HeadTrainConfig(**(TRAINING | head), block=block),
    )
    prompts = PROMPTS[len(SERVED) :]
    answers = zip(prompts.tolist(), greedy(model, prompts), strict=True)
    _record(run_dir / "data")
    with (run_dir / "data" / "samples.jsonl").open("wb") as file:
        append_samples(file, [answered(f"s{n}", *answer, {}) for n, answer in enumerate(answers)])
    distill(config)
    _record(run_dir / "corpus")
    save_file(tiny_successors(VOCAB), run_dir / "corpus" / "successors.safetensors")
    _record(run_dir / "policy")
    policy = paper_policy(topk=2, num_steps=3, max_rank=3)
    write_json(run_dir / "policy" / "policy.json", policy.to_dict() | {"measured_on": {}})
    return export(config)


def _record(directory: Path) -> None:
    """What an earlier stage leaves to be told by."""
    directory.mkdir(parents=True)
    write_json(directory / "stage.json", {"fingerprint": directory.name, "settings": {}, "inputs": {}})


def chain(bundle: Path, target: Path, length: int) -> tuple[list[list[int]], list[list[int]]]:
    """What our engine drafts for `SERVED` in chains of one length, until `NEW_TOKENS` are there.

    Returns:
        The new tokens of each prompt, and how many drafted tokens each of its rounds accepted. The last round may
        accept more than is asked for.
    """
    engine = GraftEngine.from_pretrained(bundle, target, "cpu", "float32", fallback=False)
    plan = QuotaPlan((QuotaCheckpoint(length, drafted=length),), topk=1)
    tokens, rounds = [], []
    for prompt in SERVED:
        out = engine.generate(prompt, NEW_TOKENS + length, plan=plan)
        tokens.append(out.sequences[0, len(prompt) :][:NEW_TOKENS].tolist())
        accepted = [len(drafted) for drafted in "".join(map(LETTER.get, out.stats.sources[1:])).split("b")]
        emitted = [1 + sum(accepted[:count]) + count for count in range(len(accepted))]
        rounds.append(accepted[: next(count for count, there in enumerate(emitted) if there >= NEW_TOKENS)])
    return tokens, rounds

"""`pretrain_target`: the small target that the quickstart trains, for those without a model at hand."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graft_inference.errors import GraftError
from graft_train.accelerator import new_accelerator
from graft_train.config import Config
from graft_train.config.pretrain_target import PretrainConfig
from graft_train.data.documents import Document, document_settings, of_split, read_documents
from graft_train.data.target import resolve_device
from graft_train.files import sync_tree, write_json
from graft_train.stage import run_stage

END = "<|endoftext|>"


def pretrain_target(config: Config) -> Path:
    """Writes `target/`: an ordinary transformers checkpoint, its tokenizer and pretraining.json."""
    if config.target.name_or_path:
        raise GraftError(f"target.name_or_path={config.target.name_or_path} is set: there is no target to pretrain")
    settings = {
        "pretrain": asdict(config.pretrain_target),
        "data": document_settings(config.data),
        "seed": config.seed,
    }
    scratch = ["checkpoint", "checkpoint.old"]
    return run_stage(config, "pretrain_target", "target", settings, [], lambda out: _build(config, out), scratch)


def _build(config: Config, out: Path) -> None:
    settings = config.pretrain_target
    set_seed(config.seed)
    # The schedules count optimizer steps, however many processes take one together.
    cpu = resolve_device(config.target.device).type == "cpu"
    accelerator = new_accelerator(cpu=cpu, step_scheduler_with_optimizer=False)
    if settings.batch % accelerator.num_processes:
        raise GraftError(
            f"pretrain_target.batch={settings.batch} sequences cannot be shared by {accelerator.num_processes} "
            "processes: set a multiple of their number"
        )
    documents = read_documents(config.data)
    train_documents = of_split(documents, "train", config.data)
    held_out_documents = of_split(documents, "evaluation", config.data)
    tokenizer = _tokenizer([document.text or "" for document in train_documents], settings.vocab_size)
    train = windows(train_documents, tokenizer, settings.length)
    held_out = windows(held_out_documents, tokenizer, settings.length)
    model = new_model(_model_config(settings, tokenizer))
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    model = _train(model, train, settings, config.seed, accelerator, out)

    loss = held_out_loss(model, held_out, settings.batch)
    bytes_per_token = sum(len((d.text or "").encode()) for d in held_out_documents) / held_out.numel()
    sample = _continue(model, tokenizer, "def ")
    accelerator.print(f"held-out loss {loss:.3f} nats/token, {loss / math.log(2) / bytes_per_token:.3f} bits/byte")
    accelerator.print(sample)
    if accelerator.is_main_process:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        write_json(out / "pretraining.json", {"held_out_loss": loss, "train_tokens": train.numel(), "sample": sample})
    accelerator.wait_for_everyone()


def _tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END)


def _model_config(settings: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def new_model(config: LlamaConfig) -> LlamaForCausalLM:
    """An untrained target whose layers add nothing yet: so deep a model then learns from its first steps."""
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def windows(documents: Sequence[Document], tokenizer: Any, length: int) -> Tensor:
    """All documents one behind the other, each ended, cut into rows. [rows, length] int64

    Raises:
        GraftError: less than one row.
    """
    texts = [document.text or "" for document in documents]
    if not all(texts):
        raise GraftError("pretraining wants plain text, not chats")
    ids: list[int] = []
    for row in tokenizer(texts, add_special_tokens=False).input_ids if texts else []:
        ids += [*row, tokenizer.eos_token_id]
    rows = len(ids) // length
    if rows == 0:
        raise GraftError(
            f"{len(documents)} documents give {len(ids)} tokens, less than a sequence of {length}: add data"
        )
    return torch.tensor(ids[: rows * length]).view(rows, length)


def _train(
    model: LlamaForCausalLM,
    train: Tensor,
    settings: PretrainConfig,
    seed: int,
    accelerator: Accelerator,
    out: Path,
) -> LlamaForCausalLM:
    matrices = [
        p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name and "lm_head" not in name
    ]
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate(step, settings)) for o in (muon, adamw)]
    model, muon, adamw, *schedules = accelerator.prepare(model, muon, adamw, *schedules)
    first = _resume(accelerator, out / "checkpoint")
    share = settings.batch // accelerator.num_processes
    bar = tqdm(
        range(first, settings.steps),
        initial=first,
        total=settings.steps,
        desc="pretrain_target",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    model.train()
    for step in bar:
        rows = batch_rows(step, len(train), settings.batch, seed)
        rows = rows[accelerator.process_index * share :][:share]
        batch_BS = train[rows].to(accelerator.device)
        loss = model(input_ids=batch_BS, labels=batch_BS).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip((muon, adamw), schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % settings.checkpoint_every == 0 and step + 1 < settings.steps:
            _checkpoint(accelerator, out / "checkpoint", step + 1)
    return accelerator.unwrap_model(model).eval()


def rate(step: int, settings: PretrainConfig) -> float:
    """Warm-up, plateau, linear cooldown: the factor on the peak rates."""
    left = (settings.steps - step) / max(settings.cooldown * settings.steps, 1)
    return min(1.0, (step + 1) / max(settings.warmup, 1), left)


def batch_rows(step: int, rows: int, batch: int, seed: int) -> Tensor:
    """Rows of one step: each epoch is a new permutation, and any step's rows follow from its number alone."""
    places = torch.arange(step * batch, (step + 1) * batch)
    chosen = []
    for epoch in range(int(places[0]) // rows, int(places[-1]) // rows + 1):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen.append(order[places[places // rows == epoch] % rows])
    return torch.cat(chosen)


def _checkpoint(accelerator: Accelerator, directory: Path, step: int) -> None:
    """Saved aside and renamed: a kill leaves either the old or the new one whole."""
    aside, old = directory.with_name("checkpoint.new"), directory.with_name("checkpoint.old")
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()  # each process writes the state of its own random numbers
    if accelerator.is_main_process:
        write_json(aside / "step.json", {"step": step})
        sync_tree(aside)
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)  # what a kill left when it was being deleted
            os.replace(directory, old)
        os.replace(aside, directory)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, directory: Path) -> int:
    """Steps done by the checkpoint, whose state is loaded; 0 without one."""
    old = directory.with_name("checkpoint.old")
    if accelerator.is_main_process and not directory.exists() and old.exists():  # killed between the two renames
        os.replace(old, directory)
    accelerator.wait_for_everyone()
    if not directory.exists():
        return 0
    accelerator.load_state(str(directory))
    return json.loads((directory / "step.json").read_text())["step"]


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, held_out: Tensor, batch: int) -> float:
    """Mean nats per token over at most 200 rows."""
    losses = [
        model(input_ids=rows.to(model.device), labels=rows.to(model.device)).loss.item() * len(rows)
        for rows in held_out[:200].split(batch)
    ]
    return sum(losses) / len(held_out[:200])


def _continue(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)  # type: ignore[misc]
    return str(tokenizer.decode(out[0]))

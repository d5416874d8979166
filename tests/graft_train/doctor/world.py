"""A small language, a target that speaks it, and runs of heads that were trained for it.

A question names a key and a word. The answer goes on from that word, by the rules of that key, until it comes to the
first word of its domain. There are two domains of words. A template may have the target think first, which repeats the
key. So nothing of an answer is chance, and all of it depends on what was asked.
"""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graft_train.config import Config
from graft_train.config.data import DataConfig
from graft_train.config.head import HeadTrainConfig
from graft_train.config.target import TargetConfig
from graft_train.regenerate import RegenerateConfig

SPECIAL = ("<unk>", "<end>", "<user>", "<assistant>", "<think>", "</think>")
DOMAINS, COUNT, KEYS = "ab", 16, 3
WORDS = {domain: [f"{domain}{number}" for number in range(COUNT)] for domain in DOMAINS}
ASKED = {domain: [f"{domain}key{number}" for number in range(KEYS)] for domain in DOMAINS}
SPARE = [f"spare{number}" for number in range(22)]
"""Tokens that nothing says, as every large vocabulary has them."""
VOCABULARY = [*SPECIAL, *WORDS["a"], *WORDS["b"], *ASKED["a"], *ASKED["b"], *SPARE]
IDS = {word: number for number, word in enumerate(VOCABULARY)}
POSITIONS, TAPS = 192, [1, 3]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} <end> {% else %}"
    "<assistant> {{ m.content }} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking %} <think>{% endif %}{% endif %}"
)


def rules(seed: int) -> dict[str, dict[str, str]]:
    """What follows each word, by key."""
    choose, found = random.Random(seed), {}
    for domain in DOMAINS:
        for key in ASKED[domain]:
            words = WORDS[domain][:]
            choose.shuffle(words)
            found[key] = dict(zip(words, words[1:] + words[:1], strict=True))
    return found


def answer(follows: dict[str, dict[str, str]], key: str, word: str) -> list[str]:
    words = [follows[key][word]]
    while words[-1] != f"{key[0]}0":
        words.append(follows[key][words[-1]])
    return words


def turn(choose: random.Random, domain: str) -> tuple[str, str]:
    return choose.choice(ASKED[domain]), choose.choice(WORDS[domain])


def train_target(directory: Path, seed: int, steps: int = 300) -> Path:
    """A target of four layers that speaks by these rules, and four more that change nothing but take their time."""
    follows, choose = rules(seed), random.Random(seed)

    def row() -> list[int]:
        words: list[str] = []
        while len(words) < POSITIONS:
            key, word = turn(choose, choose.choice(DOMAINS))
            words += ["<user>", key, word, "<end>", "<assistant>"]
            words += ["<think>", key, "</think>"] if choose.random() < 0.3 else []
            words += [*answer(follows, key, word), "<end>"]
        return [IDS[word] for word in words[:POSITIONS]]

    torch.manual_seed(seed)
    model = LlamaForCausalLM(config(layers=4))
    optimizer = torch.optim.AdamW(model.parameters(), 6e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps + 1, pct_start=0.1)
    for _ in range(steps):
        ids_BS = torch.tensor([row() for _ in range(6)])
        model(input_ids=ids_BS, labels=ids_BS).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    deepened(model).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=48, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=POSITIONS, bos_token_id=None,
        eos_token_id=IDS["<end>"], pad_token_id=0,
    )  # fmt: skip


def deepened(model: LlamaForCausalLM, more: int = 8) -> LlamaForCausalLM:
    """The same function with more layers: those that are added write nothing into the residual."""
    deep = LlamaForCausalLM(config(model.config.num_hidden_layers + more))
    deep.load_state_dict(model.state_dict(), strict=False)
    for layer in deep.model.layers[model.config.num_hidden_layers :]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return deep.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>", pad_token="<unk>")
    made.chat_template = TEMPLATE
    return made


def write_prompts(
    path: Path, domain: str, count: int, turns: tuple[int, ...] = (1, 2, 4, 8, 12), seed: int = 0
) -> Path:
    """Conversations of so many turns, of which the last is to be answered."""
    choose, follows, lines = random.Random(seed), rules(0), []
    for number in range(count):
        messages = []
        for _ in range(choose.choice(turns) - 1):
            key, word = turn(choose, domain)
            messages.append({"role": "user", "content": f"{key} {word}"})
            messages.append({"role": "assistant", "content": " ".join(answer(follows, key, word))})
        messages.append({"role": "user", "content": " ".join(turn(choose, domain))})
        lines.append(json.dumps({"id": f"{domain}{number}", "messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


def run_config(run: Path, target: Path, prompts: Path) -> Config:
    """Of a run whose head learns what there is to learn."""
    return Config(
        run_dir=str(run),
        threads=1,
        target=TargetConfig(str(target), dtype="float32", device="cpu"),
        data=DataConfig(path=str(prompts), calibration_share=0.05, evaluation_share=0.1),
        regenerate=RegenerateConfig(samples=200, held_out=8, max_new_tokens=20, batch=32, temperatures=[0.0]),
        head=HeadTrainConfig(
            aux_layer_ids=TAPS,
            draft_vocab_size=len(VOCABULARY),
            ttt_steps=4,
            step_decay=1.0,
            epochs=8,
            batch_tokens=1024,
            batches_per_step=1,
            optimizer="muon",
            learning_rate=1e-2,
            schedule="wsd",
            decay_share=0.5,
            mixed_precision="no",
            states="memory",
            validation_samples=12,
            measure_prompts=1,
            measure_tokens=4,
            trackers=[],
        ),
    )

"""GGUF files: what is made of one must be what the package gguf reads in it, tensor by tensor and size by size."""

import shutil
import warnings
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft_train.gguf import dequantise
from tests.graft_train.tiny_gguf import NAMES, write_gguf

from .mutate import SIZES, Damage
from .subject import Directories

CONFIGS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}


class GgufFiles(Directories):
    share = 3

    def __init__(self, root: Path) -> None:
        written = {"float32": {}, "q8_0": {"quantised": True}}
        for name, changes in written.items():
            (root / name).mkdir(parents=True)
            write_gguf(root / name / "tiny.gguf", **changes)
        super().__init__(root, {name: root / name for name in written})
        self.out = root / "out"
        self.own: dict[str, Damage] = {".gguf": damage_header}

    def open(self) -> None:
        warnings.filterwarnings("ignore")

    def use(self) -> str:
        shutil.rmtree(self.out, ignore_errors=True)
        file = self.damaged / "tiny.gguf"
        dequantise(file, self.out, "float32")
        reader = gguf.GGUFReader(file)
        model: Any = AutoModelForCausalLM.from_pretrained(self.out)
        said = {name: field.contents() for name, field in reader.fields.items()}
        for key, name in CONFIGS.items():
            if said[f"llama.{key}"] != getattr(model.config, name):
                return f"{name} is {getattr(model.config, name)}, and the file says {said[f'llama.{key}']}"
        expected, found = _weights(reader, model.config), model.state_dict()
        if differing := [name for name in expected if not torch.equal(expected[name], found[name])]:
            return f"other weights: {differing}"
        tokenizer: Any = AutoTokenizer.from_pretrained(self.out)
        vocabulary = {token: number for number, token in enumerate(said["tokenizer.ggml.tokens"])}
        return "right" if tokenizer.get_vocab().items() >= vocabulary.items() else "another vocabulary"


def _weights(reader: Any, config: Any) -> dict[str, torch.Tensor]:
    """By transformers' names, dequantised by the package itself, rows of queries and keys in transformers' order."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    weights = {f"{theirs}.weight": found[f"{ours}.weight"] for ours, theirs in whole.items()}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in NAMES.items():
            values = found[f"blk.{layer}.{ours}.weight"]
            for projection, count in heads.items():
                if projection in theirs:
                    rows = values.reshape(count, -1, 2, values.shape[1]).swapaxes(1, 2)
                    values = rows.reshape(values.shape)
            weights[f"model.layers.{layer}.{theirs}.weight"] = values
    return {name: torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)) for name, values in weights.items()}


def damage_header(path: Path, rng: Random) -> str:
    """Another number where the header has one: a value, a length, a count, a dimension, a type, an offset."""
    reader = gguf.GGUFReader(path, "r+")
    parts = [(field.name, part) for field in reader.fields.values() for part in field.parts]
    parts += [(tensor.name, part) for tensor in reader.tensors for part in tensor.field.parts]
    name, part = rng.choice([one for one in parts if one[1].dtype.kind in "uif" and one[1].size])
    # A text's bytes are numbers, too, and many: mostly another length.
    name, part = rng.choice([(name, part), rng.choice([one for one in parts if one[1].dtype.itemsize >= 4])])
    place = rng.randrange(part.size)
    values = np.array([rng.choice([*SIZES[:-2], int(part[place]) + 1, int(part[place]) - 1]) % 2**64], dtype=np.uint64)
    part[place] = values.astype(part.dtype)[0] if part.dtype.kind != "f" else rng.choice([np.nan, np.inf, 0, -1, 1e30])
    said = f"number of {name}, now {part[place]}"
    reader.data.flush()
    return said

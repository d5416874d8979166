"""The target and its tokenizer: any transformers causal language model."""

from pathlib import Path
from typing import Any

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
from graft_train.config.target import MEASURED, TargetConfig
from graft_train.data.sharded import load_zero3

UNREAD = ["*.bin", "*.pth", "*.gguf", "original/*", "consolidated*"]
"""Other copies of a model's weights, which are not downloaded."""


def target_path(settings: TargetConfig) -> Path:
    """The target's local directory; one named by its Hub id is downloaded first.

    Raises:
        GraftError: none is named, or it is neither a directory nor a model that the Hub has.
    """
    name = settings.name_or_path
    if name is None:
        raise GraftError(
            "target.name_or_path is not set: give a model's directory, a GGUF file or an id on the Hub, or choose an "
            "experiment, such as experiment=quickstart"
        )
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=UNREAD))
    except (OSError, ValueError) as error:
        raise GraftError(
            f"target.name_or_path={name} is neither a local directory nor a model on the Hub: {error}"
        ) from error


def dtype_of(settings: TargetConfig) -> torch.dtype:
    """In which the target is loaded. One that was to be measured and was not is float32 on a CPU, else bfloat16."""
    if settings.dtype == MEASURED:
        return torch.float32 if resolve_device(settings.device).type == "cpu" else torch.bfloat16
    return getattr(torch, settings.dtype)


def text_config(settings: TargetConfig) -> Any:
    """The configuration of the target's language model, without its weights."""
    return whole_config(target_path(settings)).get_text_config()


def whole_config(path: Path) -> Any:
    """The configuration of the model in a directory.

    Raises:
        GraftError: none that can be read, or a model that runs code of its own.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever a damaged one leads transformers to
        raise GraftError(f"cannot read the configuration of the target in {path}: {error}") from error


def refuse_several_spread(settings: TargetConfig, processes: int) -> None:
    """Raises GraftError where each of several processes would spread a whole target over the same devices."""
    if settings.device_map and processes > 1:
        raise GraftError(
            f"target.device_map={settings.device_map} would give each of {processes} processes a whole target, "
            "spread over the same GPUs: launch one process (--num_processes 1), or set target.device_map=null (for "
            "distill with head.shard_target=zero3 or tp)"
        )


def load_target(settings: TargetConfig, shard: str | None = None) -> PreTrainedModel:
    """The target in evaluation mode, frozen, on its device or devices. One that is quantised stays so.

    Args:
        shard: `zero3` or `tp` shares it out over the processes; see `data/sharded.py`.

    Raises:
        GraftError: no checkpoint there, a damaged one, one that cannot be shared out, or no such device.
    """
    path, device = _existing(settings), resolve_device(settings.device)
    without_plans(device)
    spread = settings.device_map
    if shard and spread:
        raise GraftError(
            f"head.shard_target={shard} and target.device_map={spread} exclude each other; set target.device_map=null"
        )
    asked: dict[str, Any] = {
        "dtype": dtype_of(settings),
        "use_safetensors": True,
        "output_loading_info": True,
        "trust_remote_code": False,
    }
    try:
        loader: Any = AutoModelForCausalLM  # what it returns depends on output_loading_info
        quantised = getattr(whole_config(path), "quantization_config", None)
        if shard == "zero3" and quantised:
            raise GraftError("DeepSpeed cannot share out a quantised target; set head.shard_target=tp or null")
        if shard == "zero3":
            model, found = load_zero3(path, **asked)
        elif shard == "tp":
            model, found = loader.from_pretrained(path, tp_plan="auto", **asked)
        else:
            # Not every quantised model can be moved once it is loaded.
            place = {"": device} if quantised and spread is None else spread
            model, found = loader.from_pretrained(path, device_map=place, **asked)
            if place is None:
                model.to(device)
    except Exception as error:  # transformers and safetensors raise many kinds
        raise GraftError(f"cannot load the target from {path}: {error}") from error
    check_whole(path, found)
    # A target's own generation settings, such as penalties, would change the distribution that a head is to learn.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model.eval().requires_grad_(False)


def load_tokenizer(settings: TargetConfig) -> PreTrainedTokenizerBase:
    """The target's tokenizer, padding on the left as generation needs it.

    Raises:
        GraftError: no tokenizer beside the target, or one without an end-of-sequence token.
    """
    path = _existing(settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
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


def _existing(settings: TargetConfig) -> Path:
    path = target_path(settings)
    if not (path / "config.json").is_file():
        raise GraftError(f"there is no model in {path} (no config.json): set target.name_or_path to one")
    return path

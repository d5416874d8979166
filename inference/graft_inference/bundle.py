"""The bundle: what training exports and the engine loads.

config.json, model.safetensors   the draft head, a checkpoint of its family
graft.json                       the policy, and fingerprints of the target
successors.safetensors           the successor matrix
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from .errors import GraftError
from .files import parse_json, read_json, read_safetensors
from .heads.checkpoint import MASK_EMBEDDING
from .heads.families import Head, HeadConfig, check_head, load_any_config, load_any_head, most_steps
from .policy.policy import METHODS, Policy, lookup_policy, paper_policy
from .policy.tree_builder import check_sources
from .retrieval.successor_matrix import SuccessorMatrix

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")
"""Sizes of the target that a bundle is made for."""

READ = ["*.json", "*.safetensors", "pytorch_model.bin", MASK_EMBEDDING]
"""What is downloaded of a bundle or a head."""

PAPER_SUCCESSORS = 8
"""Successors per token that the paper's templates use."""
PAPER_BEAM, PAPER_STEPS = 10, 9
"""Children per node that EAGLE's trees have, and their depth."""


@dataclass
class Bundle:
    """A head, the policy measured with it, and what it retrieves from.

    Attributes:
        head: None where prompt lookup alone speculates.
    """

    head: Head | None
    policy: Policy
    successors: SuccessorMatrix


def load_bundle(path: str | Path | None, target_config: Any, tokenizer: Any | None) -> Bundle:
    """Loads a bundle strictly and checks that it was made for this target.

    A bare head, with neither `graft.json` nor `successors.safetensors` beside it, gets the paper's policy
    and an empty matrix, which the prompts fill.

    Args:
        path: local directory or Hub id; None: no bundle, so that prompt lookup alone speculates.
        target_config: the target's (text) configuration.
        tokenizer: the target's, or None to skip that check.

    Raises:
        GraftError: names the file, or the property of the target that differs.
    """
    if path is None:
        matrix = SuccessorMatrix.empty(target_config.vocab_size, PAPER_SUCCESSORS, torch.device("cpu"))
        return Bundle(None, lookup_policy(), matrix)
    directory = resolve(path)
    layers = target_config.num_hidden_layers
    shape = load_any_config(directory, layers)
    if not (directory / "graft.json").exists() and not (directory / "successors.safetensors").exists():
        check_head(shape, target_config)
        head = load_any_head(directory, layers)
        return Bundle(head, *_unmeasured(shape))
    policy, successors = load_policy(directory, shape, target_config, tokenizer)
    return Bundle(load_any_head(directory, layers), policy, successors)


def load_policy(
    directory: Path, shape: HeadConfig, target_config: Any, tokenizer: Any | None
) -> tuple[Policy, SuccessorMatrix]:
    """A bundle without its head, checked as `load_bundle` does.

    Args:
        shape: of the head.
    """
    policy, made_for = load_graft(directory / "graft.json")
    check_target(shape, made_for, target_config, tokenizer)
    here = describe_target(made_for["name_or_path"], target_config, tokenizer)
    successors = load_successors(directory / "successors.safetensors", shape.vocab_size, here)
    check_plans(policy, shape, successors)
    return policy, successors


def check_plans(policy: Policy, shape: HeadConfig, successors: SuccessorMatrix) -> None:
    """Raises GraftError for a plan that asks for more than the head of this shape or the matrix has."""
    for plan in map(policy.plan, METHODS):
        check_sources(plan, shape.draft_vocab_size, {"matrix": successors}, most_steps(shape))


def _unmeasured(shape: HeadConfig) -> tuple[Policy, SuccessorMatrix]:
    """The paper's policy and an empty matrix, as large as small vocabularies let them be."""
    k = min(PAPER_SUCCESSORS, shape.vocab_size)
    steps = min(PAPER_STEPS, most_steps(shape) or PAPER_STEPS)
    policy = paper_policy(topk=min(PAPER_BEAM, shape.draft_vocab_size), num_steps=steps, max_rank=k - 1)
    return policy, SuccessorMatrix.empty(shape.vocab_size, k, torch.device("cpu"))


def load_graft(path: Path) -> tuple[Policy, dict[str, Any]]:
    """Reads `graft.json`: the policy, and what `describe_target` said of the target."""
    graft = read_json(path)
    if set(graft) != {"policy", "target"} or not all(isinstance(part, dict) for part in graft.values()):
        raise GraftError(f"{path} must hold exactly the objects policy and target; export the bundle again")
    policy, made_for = graft["policy"], graft["target"]
    known = {"name_or_path", "tokenizer", *SIZES}
    if set(made_for) != known:
        raise GraftError(
            f"{path}: target must hold exactly {sorted(known)}, not {sorted(made_for)}; export the bundle again"
        )
    _check_made_for(made_for, path)
    try:
        return Policy.from_dict(policy), made_for
    except GraftError as error:
        raise GraftError(f"{path}: {error}; export the bundle again") from error


def recorded_target(path: str | Path | None) -> str:
    """Name or path of the target that a bundle was made for.

    Args:
        path: local directory or Hub id.

    Raises:
        GraftError: no bundle, or a bare head, which does not tell.
    """
    if path is None:
        raise GraftError("without a bundle nothing says which model to run: pass --target")
    graft = resolve(path) / "graft.json"
    if not graft.exists():
        raise GraftError(f"{path} has no graft.json to say which target it was made for: pass --target")
    return load_graft(graft)[1]["name_or_path"]


def served_dtype(path: str | Path | None, device: str, dtype: str) -> str:
    """The dtype itself, and for "auto" the one to serve a bundle in.

    That is bfloat16 on CUDA, and on a CPU the one in which the policy was measured on a CPU, else float32.

    Args:
        path: of a bundle or a bare head: local directory or Hub id; None: there is none.
        device: "auto", or a device as torch writes it.

    Raises:
        GraftError: no bundle there, or a damaged one.
    """
    if dtype != "auto":
        return dtype
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return "bfloat16"
    graft = None if path is None else resolve(path) / "graft.json"
    measured_on = load_graft(graft)[0].measured_on if graft and graft.exists() else {}
    on_cpu = (measured_on.get("device") or {}).get("type") == "cpu"
    return measured_on.get("dtype", "float32") if on_cpu else "float32"


def check_tokenizer(tokenizer: Any | None, target: Any) -> None:
    """Raises GraftError where a target, a directory or Hub id, has no tokenizer and is asked in words."""
    if tokenizer is None:
        raise GraftError(f"{target} has no tokenizer: put its files beside the model")


def _check_made_for(made_for: dict[str, Any], path: Path) -> None:
    """Raises GraftError unless these are values of `describe_target`: an empty fingerprint would fit any tokenizer."""
    tokenizer = made_for["tokenizer"]
    if tokenizer is not None and not (isinstance(tokenizer, str) and re.fullmatch("[0-9a-f]{64}", tokenizer)):
        raise GraftError(f"{path}: target.tokenizer must be a SHA-256 or null, not {tokenizer!r}; export it again")
    if not isinstance(made_for["name_or_path"], str) or any(type(made_for[name]) is not int for name in SIZES):
        raise GraftError(f"{path}: target must have a name and sizes that are whole numbers; export it again")


def describe_target(name_or_path: str, target_config: Any, tokenizer: Any | None) -> dict[str, Any]:
    """What `graft.json` keeps of the target that a bundle is made for."""
    sizes = {name: getattr(target_config, name) for name in SIZES}
    return {"name_or_path": name_or_path, "tokenizer": tokenizer and tokenizer_hash(tokenizer), **sizes}


def check_target(head: HeadConfig, made_for: dict[str, Any], target_config: Any, tokenizer: Any | None) -> None:
    """Raises GraftError unless the target has the sizes, and the tokenizer, the head was trained with."""
    remedy = f"pass the target it was made for ({made_for['name_or_path']})"
    of_head = {"vocab_size": head.vocab_size, "hidden_size": head.hidden_size}
    for name, expected in (*of_head.items(), *((name, made_for[name]) for name in SIZES)):
        actual = getattr(target_config, name)
        if actual != expected:
            raise GraftError(f"this bundle wants a target with {name}={expected}, but it has {actual}: {remedy}")
    fingerprint = made_for["tokenizer"]
    if fingerprint is not None and tokenizer is not None and tokenizer_hash(tokenizer) != fingerprint:
        raise GraftError(f"the target's tokenizer is not the one this bundle was trained with: {remedy}")


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 over every token and its id."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def load_successors(path: Path, vocab_size: int, made_for: dict[str, Any] | None = None) -> SuccessorMatrix:
    """Reads and checks a successor matrix: `ids` [V, k] int32, `probs` [V, k] fp16, `counts` [V] int64.

    Args:
        made_for: what is known of the target at hand; what the file says otherwise is an error.

    Raises:
        GraftError: names the file, and the tensor or the property of the target that is wrong.
    """
    tensors, built_for = read_table(path, made_for)
    if set(tensors) != {"ids", "probs", "counts"}:
        raise GraftError(f"{path} must hold ids, probs and counts, not {sorted(tensors)}")
    ids, probs, counts = tensors["ids"], tensors["probs"], tensors["counts"]
    if ids.dtype != torch.int32 or ids.dim() != 2 or len(ids) != vocab_size:
        raise GraftError(f"{path}: ids must be int32 [{vocab_size}, k], not {ids.dtype} {list(ids.shape)}")
    if probs.dtype != torch.float16 or probs.shape != ids.shape:
        raise GraftError(f"{path}: probs must be float16 {list(ids.shape)}, not {probs.dtype} {list(probs.shape)}")
    if counts.dtype != torch.int64 or counts.shape != (vocab_size,):
        raise GraftError(f"{path}: counts must be int64 [{vocab_size}], not {counts.dtype} {list(counts.shape)}")
    if ids.numel() and (int(ids.min()) < -1 or int(ids.max()) >= vocab_size):
        raise GraftError(f"{path}: ids must lie in -1..{vocab_size - 1}; the file is corrupt")
    if probs.numel() and not bool(((probs >= 0) & (probs <= 1)).all()):
        raise GraftError(f"{path}: probs must lie in 0..1; the file is corrupt")
    if counts.numel() and int(counts.min()) < 0:
        raise GraftError(f"{path}: counts must not be negative; the file is corrupt")
    ordered = ids.sort(dim=1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise GraftError(f"{path}: ids names a successor of one token twice; the file is corrupt")
    return SuccessorMatrix(ids, probs, made_for=built_for)


def read_table(
    path: Path, made_for: dict[str, Any] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """The tensors of a corpus, and what it says of the target it was built for (None: nothing).

    Raises:
        GraftError: an unreadable file, or one built for a target that differs from `made_for`.
    """
    tensors = read_safetensors(path)
    with safe_open(path, "pt") as file:
        recorded = (file.metadata() or {}).get("made_for")
    try:
        built_for = parse_json(recorded) if recorded else None
    except ValueError as error:
        raise GraftError(f"{path}: what it was made for is not JSON ({error}); build the corpus again") from error
    if not isinstance(built_for, dict | None):
        raise GraftError(f"{path}: what it was made for must be a JSON object; build the corpus again")
    for name, actual in (made_for or {}).items():
        expected = (built_for or {}).get(name)
        if expected is not None and actual is not None and actual != expected:
            raise GraftError(
                f"{path} was built for another target: its {name} is {expected}, not {actual}; "
                "run graft build_corpus for this one"
            )
    return tensors, built_for


def load_target_model(
    path: str | Path,
    device: str,
    dtype: str,
    device_map: str | dict[str, Any] | None = None,
    tp_plan: str | None = None,
) -> tuple[Any, Any | None]:
    """Loads the target and its tokenizer (None where it has none).

    Args:
        device: "auto" for CUDA where there is a GPU, and for the CPU elsewhere.
        dtype: as torch calls it; see `served_dtype`.
        device_map: spreads the target over devices, as transformers does; instead of `device`.
        tp_plan: "auto" shares the target out over the processes that torchrun started; instead of both.

    Raises:
        GraftError: not a model transformers can load without code of the model's own, an unknown dtype or device, or
            one process for a tp_plan.
    """
    check_launch(tp_plan, device_map)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_dtype = getattr(torch, str(dtype), None)
    if not isinstance(torch_dtype, torch.dtype):
        raise GraftError(f"dtype {dtype!r} does not exist: use float32, bfloat16 or float16")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GraftError(f"device {device!r} cannot be used here: {error}") from error
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch_dtype,
            device_map=device_map,
            tp_plan=tp_plan,
            output_loading_info=True,
            trust_remote_code=False,
        )
        model, found = loaded
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise GraftError(f"no target can be loaded from {path}: {error}") from error
    check_whole(path, found)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError):
        tokenizer = None
    if device_map is None and tp_plan is None:
        model.to(device)
    return model.eval().requires_grad_(False), tokenizer


def check_whole(path: str | Path, found: dict[str, Any]) -> None:
    """Raises GraftError where a checkpoint lacks tensors: transformers goes on with random weights in their place.

    Args:
        found: the loading information that `from_pretrained` gives beside the model.
    """
    if found["missing_keys"]:
        raise GraftError(f"{path} lacks the tensors {sorted(found['missing_keys'])}: copy or download it again")


def check_launch(tp_plan: str | None, device_map: object) -> None:
    """Raises GraftError where a target cannot be shared out over processes as asked."""
    if tp_plan and device_map:
        raise GraftError(f"tp_plan={tp_plan} and device_map={device_map} exclude each other: choose one of them")
    if tp_plan and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise GraftError(f"tp_plan={tp_plan} needs several processes: start them with torchrun --nproc-per-node")


def resolve(path: str | Path, revision: str | None = None) -> Path:
    """Returns a local directory as it is, and a Hub id as its downloaded snapshot."""
    if not str(path):
        raise GraftError("the name of the bundle is empty: give a directory or a Hub id")
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=READ))
    except (HFValidationError, RepositoryNotFoundError, OSError) as error:
        raise GraftError(f"{path} is neither a directory nor a Hub repository that can be read: {error}") from error

"""Damages of files in place: bytes, JSON values, tensors, and whole files that change places."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SIZES = [0, 1, 2, 7, 17, 255, 1000, 1024, 4096, 65_536, 100_000, 10**7, 10**9, 2**31 - 1, 2**31, 2**32, 2**40]
SIZES += [2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**30, 10**400]
"""What code may allocate by, or count to."""
NUMBERS = [*SIZES, -1, -7, -(2**63), 0.0, -0.0, 0.5, -3.5, 1e-30, 1e-9, 1e9, 1e30, 1e308]
VALUES = [*NUMBERS, None, True, False, "", "x", "1", "/etc/hostname", "../..", [], {}, [0], [[]], [None], {"a": 1}]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, "'"]
RAW += ["9" * 5000, '"\\ud800"', '{"a": 1, "a": 2}', '"\\u0000"', "1.", "01", "\ufeff1"]
"""What is no JSON, and Python may take."""
KEYS = ["extra", "norm_output", "sliding_window", "acceptance", "rope_scaling", "quantization_config", "auto_map"]
KEYS += ["block_size", "partial_rotary_factor", "logit_scale", "__class__", ""]
FLOATS = [torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 65504.0, 1e-45, 0.0, -1.0]
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.int64, torch.bool]
HEADER = 400
"""Bytes at a file's beginning, which readers stumble over most."""
Damage = Callable[[Path, Random], str]


def damage(directory: Path, rng: Random, others: list[Path], own: dict[str, Damage] | None = None) -> str:
    """Damages one file of a directory; says how.

    Args:
        others: whole directories, whose files may take its place.
        own: further damages by suffix.
    """
    path = rng.choice(sorted(file for file in directory.rglob("*") if file.is_file()))
    kinds = {".json": damage_json, ".safetensors": damage_tensors} | (own or {})
    found = kinds.get(path.suffix)
    draw = rng.random()
    if draw < 0.08:
        said = replace_file(path, directory, rng, others)
    elif found is not None and draw < 0.75:
        said = found(path, rng)
    else:
        said = damage_bytes(path, rng)
    return f"{path.relative_to(directory)}: {said}"


def replace_file(path: Path, directory: Path, rng: Random, others: list[Path]) -> str:
    """It goes, or another file stands in its place."""
    kind = rng.choice(["missing", "swapped", "other", "empty", "directory"])
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    if kind == "swapped":
        other = rng.choice(files)
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)
    elif kind == "other" and others:
        theirs = rng.choice(others) / path.relative_to(directory)
        if theirs.is_file():
            shutil.copyfile(theirs, path)
    else:
        path.unlink()
        if kind == "empty":
            path.touch()
        elif kind == "directory":
            path.mkdir()
    return kind


def damage_bytes(path: Path, rng: Random) -> str:
    content = bytearray(path.read_bytes())
    place = rng.randrange(max(len(content), 1))
    place = place % HEADER if rng.random() < 0.5 else place
    kind = rng.choice(["bit", "bit", "byte", "cut", "repeat", "zeros", "number", "out", "lines"])
    if kind == "bit" and content:
        content[place % len(content)] ^= 1 << rng.randrange(8)
    elif kind == "byte" and content:
        content[place % len(content)] = rng.randrange(256)
    elif kind == "cut":
        del content[place:]
    elif kind == "repeat":
        content[place:place] = content[place : place + rng.choice([1, 64, 4096])]
    elif kind == "zeros":
        content[place : place + 16] = bytes(len(content[place : place + 16]))
    elif kind == "number":
        packed = struct.pack(*rng.choice([("<Q", rng.choice(SIZES) % 2**64), ("<I", rng.choice(SIZES) % 2**32)]))
        content[place : place + len(packed)] = packed
    elif kind == "out":
        del content[place : place + rng.choice([1, 8, 64])]
    else:
        content[place:place] = rng.choice([b"\n", b"\r\n", b"\0", b"\xff", b"\xed\xa0\x80", b'"', b"}", b","])
    path.write_bytes(bytes(content))
    return f"{kind} at {place}"


def damage_json(path: Path, rng: Random) -> str:
    values = json.loads(path.read_text(encoding="utf-8"))
    text, said = damaged_value(values, rng)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return said


def damaged_value(values: Any, rng: Random) -> tuple[str, str]:
    """JSON of a value in which something is changed, and what."""
    places = list(_places(values))
    if not places:
        return rng.choice(RAW), "raw of all"
    where, parent, key = rng.choice(places)
    kind = rng.choice(["value", "value", "value", "raw", "gone", "more", "near", "twice", "moved", "long"])
    if kind == "gone":
        del parent[key]
    elif kind == "more" and isinstance(parent, dict):
        parent[rng.choice(KEYS)] = rng.choice(VALUES)
    elif kind == "near" and type(parent[key]) in (int, float):
        parent[key] += rng.choice([1, -1, 0.5])
    elif kind == "twice" and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), parent[key])
    elif kind == "moved":
        parent[key] = rng.choice(places)[1]
        if _is_round(values):
            parent[key] = None
    elif kind == "long":
        parent[key] = rng.choice([[0] * 3000, list(range(3000)), "x" * 3000, {str(n): n for n in range(3000)}])
    else:
        parent[key] = "HERE" if kind == "raw" else rng.choice(VALUES)
    said = f"{kind} of {where}, now {str(parent)[:60]}"
    return json.dumps(values).replace('"HERE"', rng.choice(RAW)), said


def _is_round(values: Any) -> bool:
    try:
        json.dumps(values)
    except ValueError:
        return True
    return False


def _places(value: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, container, key) of everything within."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield f"{where}.{key}", value, key
        yield from _places(item, f"{where}.{key}")


def damage_tensors(path: Path, rng: Random) -> str:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name = rng.choice(sorted(tensors))
    if rng.random() < 0.1:
        said, metadata = "metadata", _damaged_metadata(metadata or {}, rng)
    else:
        said = damage_tensor(tensors, name, rng)
    save_file(tensors, path, metadata)
    return f"{said} of {name}"


def damage_tensor(tensors: dict[str, torch.Tensor], name: str, rng: Random) -> str:
    """Changes one of some tensors; says how."""
    tensor = tensors[name].clone()
    kind = rng.choice(["element", "element", "rows", "dtype", "shape", "gone", "renamed", "swapped", "scaled", "wide"])
    if kind in ("element", "rows") and tensor.numel():
        row = tensor.view(-1)[rng.randrange(tensor.numel())] if kind == "element" else tensor[: rng.randrange(1, 9)]
        if tensor.is_floating_point():
            row.copy_(torch.tensor(rng.choice(FLOATS)).to(tensor.dtype))
        else:
            info = torch.iinfo(tensor.dtype) if tensor.dtype != torch.bool else None
            row.fill_(rng.choice([0, 1] if info is None else [info.min, info.max, -1 % info.max, 0, 1, 60, 61]))
        tensors[name] = tensor
    elif kind == "dtype":
        tensors[name] = tensor.to(rng.choice(DTYPES))
    elif kind == "shape":
        shapes = [tensor.flatten(), tensor[:-1] if tensor.dim() else tensor[None], tensor[None], tensor.flatten()[:0]]
        tensors[name] = rng.choice([*shapes, tensor.flatten()[:1]]).clone().contiguous()
    elif kind == "wide":
        tensors[name] = torch.cat((tensor, tensor), dim=-1) if tensor.dim() else tensor
    elif kind == "renamed":
        tensors[rng.choice(["extra", "layers.0.x", f"{name}x", name.upper()])] = tensors.pop(name)
    elif kind == "swapped":
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other].clone(), tensor
    elif kind == "scaled" and tensor.is_floating_point():
        tensors[name] = tensor * rng.choice([1e4, 1e20, 3e38, -1, 0])
    else:
        del tensors[name]
    return kind


def _damaged_metadata(metadata: dict[str, str], rng: Random) -> dict[str, str]:
    name = rng.choice(sorted(metadata) or ["made_for"])
    told = ["{", "[]", "NaN", "1", "null", '{"vocab_size": "x"}', '{"vocab_size": 1}', "[" * 3000 + "]" * 3000, ""]
    return metadata | {name: rng.choice(told)}

"""Damages bundles at random and serves them: each is refused with our error, or decodes what the target alone does.

    python -m tests.graft_inference.fuzz_bundle --mutations 2000 --seed 0

prints what became of them, and ends with status 1 where one gave a wrong token, another exception, took longer than
`SECONDS`, or more memory than twice its files beyond what the sound bundle takes.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from graft_inference import GraftEngine, GraftError
from graft_inference.bundle import load_bundle

from .tiny import learned_policy, tiny_model, tiny_policy, told_policy
from .tiny_bundle import tiny_tokenizer, write_bundle

SECONDS = 60
SLACK_BYTES = 32 << 20
"""What an allocator takes in one piece, and another mutation's rubbish."""
NUMBERS = [0, -1, 1, 2, 7, 1000, 100_000, 10**9, 2**31, 2**63, 10**30, 0.0, -0.0, 0.5, -3.5, 1e-30, 1e30, 1e308]
VALUES = [*NUMBERS, None, True, False, "", "x", "1", [], {}, [0], [[]], {"a": 1}]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "[" * 3000 + "]" * 3000, "'", "9" * 5000]
"""What is no JSON, and Python may take."""
FLOATS = [torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 65504.0, 1e-45, 0.0, -1.0]


def mutate(directory: Path, rng: random.Random) -> str:
    """Damages one bundle in place; says how."""
    path = rng.choice(sorted(file for file in directory.iterdir()))
    kinds: list[Callable[[Path, random.Random], str]] = [damage_bytes]
    kinds += [damage_json] * 3 if path.suffix == ".json" else [damage_tensors] * 3
    return f"{path.name}: {rng.choice(kinds)(path, rng)}"


def damage_bytes(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    # The header of a file of tensors is what most readers stumble over.
    place = place % 400 if rng.random() < 0.5 else place
    kind = rng.choice(["bit", "byte", "cut", "repeat", "zeros", "missing", "swapped"])
    if kind == "bit":
        content[place % len(content)] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        content[place % len(content)] = rng.randrange(256)
    elif kind == "cut":
        del content[place:]
    elif kind == "repeat":
        content[place:place] = content[place : place + 64]
    elif kind == "zeros":
        content[place : place + 16] = bytes(len(content[place : place + 16]))
    elif kind == "missing":
        path.unlink()
        return kind
    else:
        content = bytearray(rng.choice(sorted(path.parent.iterdir())).read_bytes())
    path.write_bytes(bytes(content))
    return f"{kind} at {place}"


def damage_json(path: Path, rng: random.Random) -> str:
    values = json.loads(path.read_text())
    where, parent, key = rng.choice(list(_places(values)))
    kind = rng.choice(["value", "value", "raw", "gone", "more", "near", "twice"])
    if kind == "gone":
        del parent[key]
    elif kind == "more" and isinstance(parent, dict):
        parent[rng.choice(["extra", "norm_output", "sliding_window", "acceptance"])] = rng.choice(VALUES)
    elif kind == "near" and type(parent[key]) in (int, float):
        parent[key] += rng.choice([1, -1, 0.5])
    elif kind == "twice" and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), parent[key])
    else:
        parent[key] = "HERE" if kind == "raw" else rng.choice(VALUES)
    text = rng.choice(RAW)
    path.write_text(json.dumps(values).replace('"HERE"', text))
    return f"{kind} of {where}, now {str(parent)[:60]}"


def _places(value: Any, where: str = "") -> Any:
    """(name, container, key) of everything within."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield f"{where}.{key}", value, key
        yield from _places(item, f"{where}.{key}")


def damage_tensors(path: Path, rng: random.Random) -> str:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name = rng.choice(sorted(tensors))
    tensor = tensors[name].clone()
    kind = rng.choice(
        ["element", "element", "rows", "dtype", "shape", "gone", "renamed", "swapped", "scaled", "metadata"]
    )
    if kind in ("element", "rows") and tensor.numel():
        part = tensor.view(-1)[rng.randrange(tensor.numel())] if kind == "element" else tensor[: rng.randrange(1, 9)]
        if tensor.is_floating_point():
            part.copy_(torch.tensor(rng.choice(FLOATS)).to(tensor.dtype))
        else:
            info = torch.iinfo(tensor.dtype) if tensor.dtype != torch.bool else None
            part.fill_(rng.choice([0, 1] if info is None else [info.min, info.max, -1, 0, 1, 60, 61]))
        tensors[name] = tensor
    elif kind == "dtype":
        tensors[name] = tensor.to(rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool]))
    elif kind == "shape":
        shapes = [tensor.flatten(), tensor[:-1].contiguous(), tensor[None], tensor[:0], tensor.flatten()[:1]]
        tensors[name] = rng.choice(shapes).clone()
    elif kind == "renamed":
        tensors[rng.choice(["extra", "layers.0.x", f"{name}x"])] = tensors.pop(name)
    elif kind == "swapped":
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other].clone(), tensor
    elif kind == "scaled" and tensor.is_floating_point():
        tensors[name] = tensor * rng.choice([1e4, 1e20, 3e38, -1, 0])
    elif kind == "metadata":
        metadata = {"made_for": rng.choice(["{", "[]", "NaN", '{"vocab_size": "x"}', '{"vocab_size": 1}'])}
    else:
        del tensors[name]
    save_file(tensors, path, metadata)
    return f"{kind} of {name}"


class Fuzz:
    """Serves damaged copies of a few sound bundles, of one target in memory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model, self.tokenizer = tiny_model("llama"), tiny_tokenizer()
        self.prompt = torch.tensor([[5, 9, 5, 9, 5, 9, 5, 7]])
        self.bundles = {name: self._write(name) for name in ("quotas", "learned", "told", "bare")}
        self.expected = self._decode(self.bundles["learned"], ("autoregressive",))
        self.peak = max(self._peak(lambda bundle=bundle: self._decode(bundle)) for bundle in self.bundles.values())

    def _write(self, name: str) -> Path:
        bundle = write_bundle(self.root / name, Path("target"))
        policies = {"learned": learned_policy, "told": told_policy}
        graft = json.loads((bundle / "graft.json").read_text())
        graft["policy"] = policies.get(name, tiny_policy)().to_dict()
        (bundle / "graft.json").write_text(json.dumps(graft))
        if name == "bare":
            for file in ("graft.json", "successors.safetensors"):
                (bundle / file).unlink()
        return bundle

    def _decode(self, bundle: Path, methods: tuple[str, ...] = ("graft", "eagle3", "retrieve")) -> list[Any]:
        """Greedy tokens of every method, and those that one seed draws."""
        loaded = load_bundle(bundle, self.model.config, self.tokenizer)
        engine = GraftEngine.from_bundle(loaded, self.model, packed=False, check=False, fallback=False)
        try:
            greedy = [engine.generate(self.prompt, 10, method=method).sequences.tolist() for method in methods]
            drawn = [engine.generate(self.prompt, 10, 1.0, methods[0], seed=3).sequences.tolist()]
        finally:
            engine.target.release()
        assert all(one == greedy[0] for one in greedy), "methods disagree"
        return [greedy[0], *drawn]

    def _peak(self, work: Callable[[], object]) -> int:
        """Bytes that the process takes at most beyond what it held before."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before

    def run(self, seed: int) -> tuple[str, str]:
        """What became of one mutation, and what it was: "right", "refused", or what went wrong."""
        rng = random.Random(seed)
        name = rng.choice(sorted(self.bundles))
        bundle = self.root / "damaged"
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(self.bundles[name], bundle)
        damage = f"seed {seed}, {name}, {mutate(bundle, rng)}"
        size = sum(file.stat().st_size for file in bundle.iterdir())
        outcome = "right"

        def serve() -> None:
            nonlocal outcome
            try:
                if self._decode(bundle) != self.expected:
                    outcome = "wrong tokens"
            except GraftError as error:
                outcome = "refused" if str(error) else "an error without a word"
            except AssertionError:
                outcome = "wrong tokens"
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"

        signal.alarm(SECONDS)
        peak = self._peak(serve)
        signal.alarm(0)
        if outcome in ("right", "refused") and peak > self.peak + 2 * size + SLACK_BYTES:
            outcome = f"{peak >> 20} MiB"
        return outcome, damage


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root:
        fuzz = Fuzz(Path(root))
        for number in range(options.mutations):
            outcome, damage = fuzz.run(options.seed + number)
            counts[outcome if outcome in ("right", "refused") else "fault"] += 1
            if outcome not in ("right", "refused"):
                print(f"{outcome[:300]}: {damage}", flush=True)
            if (number + 1) % 200 == 0:
                print(f"{number + 1} mutations: {dict(counts)}", flush=True)
    print(f"{options.mutations} mutations from seed {options.seed}: {dict(counts)}")
    return int(counts["fault"] > 0)


if __name__ == "__main__":
    sys.exit(main())

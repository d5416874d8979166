"""Bundles and heads: served beside a tiny target, every method must say what the target alone does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from graft_inference import GraftEngine
from graft_inference.bundle import load_bundle
from graft_inference.heads.block.checkpoint import save_block_head
from graft_inference.heads.block.view import SlidingWindow
from graft_inference.heads.eagle3.checkpoint import save_head
from tests.graft_inference.test_block_checkpoint import to_speculators
from tests.graft_inference.test_block_drafter import tiny_block_head
from tests.graft_inference.tiny import learned_policy, tiny_head, tiny_model, tiny_policy, told_policy
from tests.graft_inference.tiny_bundle import tiny_tokenizer, write_bundle

from .mutate import Damage, damage_tensor
from .subject import Directories

PROMPT = torch.tensor([[5, 9, 5, 9, 5, 9, 5, 7]])
NEW = 5


class Served(Directories):
    """Bundles or bare heads, of one target in memory."""

    def open(self) -> None:
        self.model, self.tokenizer = tiny_model("llama"), tiny_tokenizer()
        self.expected = self._decode(next(iter(self.sound.values())), ("autoregressive",))

    def use(self) -> str:
        found = self._decode(self.damaged, ("graft", "eagle3", "retrieve"))
        return "right" if found == self.expected else f"wrong tokens: {found}"

    def _decode(self, bundle: Path, methods: tuple[str, ...]) -> list[Any]:
        """Greedy tokens, which all methods must agree on, and those that one seed draws."""
        loaded = load_bundle(bundle, self.model.config, self.tokenizer)
        engine = GraftEngine.from_bundle(loaded, self.model, packed=False, check=False, fallback=False)
        try:
            greedy = [engine.generate(PROMPT, NEW, method=method).sequences.tolist() for method in methods]
            drawn = engine.generate(PROMPT, NEW, 1.0, methods[0], seed=3).sequences.tolist()
        finally:
            engine.target.release()
        return [greedy[0], drawn] if all(one == greedy[0] for one in greedy) else greedy


class Bundles(Served):
    share = 5

    def __init__(self, root: Path) -> None:
        policies = {"quotas": tiny_policy, "learned": learned_policy, "told": told_policy}
        super().__init__(root, {name: _bundle(root / name, policy) for name, policy in policies.items()})


class Heads(Served):
    """Bare heads of both families, in every dialect that is read."""

    share = 5

    def __init__(self, root: Path) -> None:
        model = tiny_model("llama")
        made: dict[str, Callable[[Path], object]] = {
            "eagle3": lambda out: save_head(tiny_head(model), out),
            "eagle3 whole": lambda out: save_head(tiny_head(model, draft_vocab_size=61), out),
            "eagle3 nested": lambda out: save_head(tiny_head(model, qk_norm=True, fc_norm=True, norm_output=True), out),
            "eagle3 window": lambda out: save_head(tiny_head(model, sliding_window=4, norm_before_fc=True), out),
            "eagle3 pickled": lambda out: _pickled(out, model),
        }
        blocks: dict[str, dict[str, Any]] = {
            "dflash": {"block_size": 4},
            "dflash window": {"block_size": 4, "causal": None, "sliding": SlidingWindow((1,), 3, from_anchor=True)},
            "dspark": {"block_size": 4, "sample_from_anchor": True, "markov_rank": 3},
        }
        for name, changes in blocks.items():
            made[name] = lambda out, changes=changes: save_block_head(tiny_block_head(model, **changes), out)
            made[f"{name} speculators"] = lambda out, name=name: to_speculators(shutil.copytree(root / name, out))
        for name, write in made.items():
            write(root / name)
        super().__init__(root, {name: root / name for name in made})
        self.own: dict[str, Damage] = {".bin": damage_pickle}


def _bundle(directory: Path, policy: Callable[[], Any]) -> Path:
    write_bundle(directory, Path("target"))
    graft = json.loads((directory / "graft.json").read_text()) | {"policy": policy().to_dict()}
    (directory / "graft.json").write_text(json.dumps(graft))
    return directory


def _pickled(directory: Path, model: Any) -> None:
    """As the official heads are."""
    save_head(tiny_head(model), directory)
    weights = directory / "model.safetensors"
    torch.save(load_file(weights), directory / "pytorch_model.bin")
    weights.unlink()


def damage_pickle(path: Path, rng: Any) -> str:
    """Other tensors, and what is no tensor, in a sound archive."""
    tensors = torch.load(path, weights_only=True)
    name = rng.choice(sorted(tensors))
    kind = rng.choice(["tensor", "tensor", "expanded", "other", "sparse", "strided", "view"])
    if kind == "tensor":
        kind = damage_tensor(tensors, name, rng)
    elif kind == "expanded":
        tensors[name] = torch.zeros(1).expand(rng.choice([2**20, 2**31, 2**40]))
    elif kind == "sparse":
        tensors[name] = torch.eye(3).to_sparse()
    elif kind == "strided":
        tensors[name] = tensors[name].mT if tensors[name].dim() > 1 else tensors[name][::2]
    elif kind == "view":
        tensors[name] = torch.cat([tensors[name]] * 3)[: len(tensors[name])]
    else:
        tensors[name] = rng.choice([1, "x", None, [1], {"a": tensors[name]}])
    torch.save(tensors, path)
    return f"{kind} of {name}"

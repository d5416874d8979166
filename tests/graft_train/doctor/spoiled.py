"""Runs that are spoiled on purpose, each by one cause and nothing else, and two that are not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from graft_inference import Policy, QuotaCheckpoint, QuotaPlan
from graft_inference.heads.eagle3.checkpoint import load_head, save_head
from graft_inference.heads.eagle3.model import DraftHead
from graft_inference.policy.plan import AUTOREGRESSIVE
from graft_train.config import Config
from graft_train.distill import distill
from graft_train.doctor import DoctorOptions
from graft_train.regenerate import regenerate

from .world import IDS, SPARE, WORDS, run_config, tokenizer, train_target, write_prompts

PLAN = QuotaPlan((QuotaCheckpoint(4, drafted=4),), topk=1)
POLICY = Policy(PLAN, PLAN, AUTOREGRESSIVE)


class World:
    """Targets, prompts, and a run whose head is well; what is spoiled is copied from there.

    Args:
        root: an empty directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.target = train_target(root / "target", seed=0)
        self.prompts = write_prompts(root / "a.jsonl", "a", 200)
        self.healthy = self.trained("healthy", self.config("healthy"))

    def config(self, name: str, prompts: Path | None = None) -> Config:
        return run_config(self.root / name, self.target, prompts or self.prompts)

    def more_prompts(self, domain: str) -> str:
        return str(write_prompts(self.root / f"more_{domain}.jsonl", domain, 12, seed=1))

    def trained(self, name: str, config: Config) -> Path:
        """The run, with the healthy run's answers unless it has its own."""
        if not (self.root / name / "data").exists():
            regenerate(config)
        distill(config)
        return self.with_policy(self.root / name, POLICY)

    def retrained(self, name: str, **changes: object) -> Path:
        """Another head for the healthy run's answers."""
        shutil.copytree(self.healthy / "data", self.root / name / "data")
        config = self.config(name)
        config.head = replace(config.head, **changes)  # type: ignore[arg-type]
        return self.trained(name, config)

    def copied(self, name: str) -> Path:
        return shutil.copytree(self.healthy, self.root / name)

    @staticmethod
    def with_policy(run: Path, policy: Policy) -> Path:
        (run / "policy").mkdir(exist_ok=True)
        (run / "policy" / "policy.json").write_text(json.dumps(policy.to_dict()))
        return run

    def options(self, run: Path, target: Path | None = None, prompts: str | None = None) -> DoctorOptions:
        return DoctorOptions(str(run), str(target or self.target), prompts, device="cpu", dtype="float32")


def healthy(world: World) -> DoctorOptions:
    return world.options(world.healthy, prompts=world.more_prompts("a"))


def healthy_otherwise(world: World) -> DoctorOptions:
    """Drawn answers, another norm, and no prompts."""
    config = world.config("otherwise")
    config.regenerate = replace(config.regenerate, temperatures=[0.0, 0.8])
    config.head = replace(config.head, norm_before_residual=True)
    return world.options(world.trained("otherwise", config))


def answers(world: World) -> DoctorOptions:
    """Another model, which knows other rules, wrote the answers."""
    other = train_target(world.root / "other", seed=1, steps=60)
    config = world.config("answers")
    config.target = replace(config.target, name_or_path=str(other))
    regenerate(config)
    return world.options(world.trained("answers", world.config("answers")))


def template(world: World) -> DoctorOptions:
    """The training prompts had the target think first."""
    config = world.config("template")
    config.data = replace(config.data, chat_template_kwargs={"enable_thinking": True})
    return world.options(world.trained("template", config))


def vocabulary(world: World) -> DoctorOptions:
    """The head can propose one token in twenty."""
    run = world.copied("vocabulary")
    head = load_head(run / "head")
    kept_D = torch.tensor(sorted(IDS[word] for word in WORDS["a"][:3]))
    tensors = {name: tensor for name, tensor in head.state_dict().items() if name not in ("d2t", "t2d")}
    tensors["lm_head.weight"] = tensors["lm_head.weight"][kept_D]
    cut = DraftHead(replace(head.config, draft_vocab_size=len(kept_D)))
    cut.load_state_dict(tensors, strict=False)
    cut.set_draft_vocabulary(kept_D)
    save_head(cut, run / "head")
    return world.options(run)


def layers(world: World) -> DoctorOptions:
    """The configuration names the layers before those that the head reads."""
    run = world.copied("layers")
    head = load_head(run / "head")
    moved = tuple(layer - 1 for layer in head.config.aux_layer_ids)
    save_head(DraftHead.of_tensors(replace(head.config, aux_layer_ids=moved), dict(head.state_dict())), run / "head")
    return world.options(run)


def norm(world: World) -> DoctorOptions:
    """The configuration says the contrary of where the residual is normed."""
    run = world.copied("norm")
    head = load_head(run / "head")
    flipped = replace(head.config, norm_before_residual=not head.config.norm_before_residual)
    save_head(DraftHead.of_tensors(flipped, dict(head.state_dict())), run / "head")
    return world.options(run)


def under_training(world: World) -> DoctorOptions:
    """Three steps."""
    return world.options(world.retrained("under", max_steps=3))


def over_training(world: World) -> DoctorOptions:
    """Four answers, again and again."""
    config = world.config("over")
    config.regenerate = replace(config.regenerate, samples=4)
    config.head = replace(config.head, epochs=150, validation_samples=0)
    return world.options(world.trained("over", config))


def depth(world: World) -> DoctorOptions:
    """It never saw its own outputs."""
    return world.options(world.retrained("depth", ttt_steps=1))


def context(world: World) -> DoctorOptions:
    """It never saw more than one short question."""
    run = world.trained(
        "context", world.config("context", write_prompts(world.root / "one.jsonl", "a", 200, turns=(1,)))
    )
    return world.options(run)


def prompts(world: World) -> DoctorOptions:
    """Prompts of the other domain, of which the head has seen nothing."""
    return world.options(world.copied("prompts"), prompts=world.more_prompts("b"))


def cost(world: World) -> DoctorOptions:
    """The same function, by a thousand times as many neurons, most of which say nothing."""
    run = world.copied("cost")
    head, width = load_head(run / "head"), 1 << 16
    tensors, size = dict(head.state_dict()), head.config.intermediate_size
    for name in ("gate_proj", "up_proj"):
        weight = tensors[f"midlayer.mlp.{name}.weight"]
        tensors[f"midlayer.mlp.{name}.weight"] = torch.cat((weight, torch.zeros(width - size, weight.shape[1])))
    weight = tensors["midlayer.mlp.down_proj.weight"]
    tensors["midlayer.mlp.down_proj.weight"] = torch.cat((weight, torch.zeros(weight.shape[0], width - size)), dim=1)
    save_head(DraftHead.of_tensors(replace(head.config, intermediate_size=width), tensors), run / "head")
    return world.options(run)


def fallback(world: World) -> DoctorOptions:
    """The learned plan is plain decoding."""
    return world.options(world.with_policy(world.copied("fallback"), replace(POLICY, graft=AUTOREGRESSIVE)))


def ties(world: World) -> DoctorOptions:
    """A target that has a twin for every word, whose logit is less by a ten-thousandth."""
    model = AutoModelForCausalLM.from_pretrained(world.target)
    with torch.no_grad():
        for spare, word in zip(SPARE, WORDS["a"], strict=False):
            model.lm_head.weight[IDS[spare]] = model.lm_head.weight[IDS[word]] * 0.9999
    model.save_pretrained(world.root / "tied")
    tokenizer().save_pretrained(world.root / "tied")
    return world.options(world.copied("ties"), world.root / "tied")


HEALTHY: dict[str, Callable[[World], DoctorOptions]] = {"as trained": healthy, "otherwise": healthy_otherwise}
SPOILED: dict[str, tuple[str, Callable[[World], DoctorOptions]]] = {
    "another model's answers": ("answers", answers),
    "thinking in training alone": ("template", template),
    "a twentieth of the vocabulary": ("vocabulary", vocabulary),
    "layers off by one": ("aux-layers", layers),
    "the other norm": ("aux-layers", norm),
    "three steps of training": ("under-training", under_training),
    "four answers by heart": ("over-training", over_training),
    "trained one step ahead": ("depth", depth),
    "trained on short texts": ("context", context),
    "prompts of another domain": ("prompts", prompts),
    "a slow head": ("cost", cost),
    "a plan that never speculates": ("fallback", fallback),
    "a target of twins": ("ties", ties),
}
"""What is wrong: the check that must name it first, and what makes it wrong."""

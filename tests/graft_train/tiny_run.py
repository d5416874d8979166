"""A run small enough for a test: made-up sources, two steps of everything."""

import random
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from graft_train.build_corpus import CorpusConfig
from graft_train.config import Config
from graft_train.config.data import DataConfig
from graft_train.config.head import HeadTrainConfig
from graft_train.config.policy import CalibrateConfig
from graft_train.config.target import TargetConfig
from graft_train.evaluate import EvaluateConfig
from graft_train.regenerate import RegenerateConfig

WORDS = ("alpha", "beta", "gamma", "delta", "for", "return", "if", "value", "index", "self")


def write_sources(directory: Path, files: int = 40) -> None:
    """Files of random words; enough that every split gets some."""
    directory.mkdir(parents=True)
    choose = random.Random(0)
    for number in range(files):
        lines = (" ".join(choose.choices(WORDS, k=8)) for _ in range(30))
        (directory / f"file{number}.py").write_text("\n".join(lines))


def tiny_config(run_dir: Path, sources: Path) -> Config:
    """Of the target in `{run_dir}/target`."""
    return Config(
        run_dir=str(run_dir),
        threads=1,
        target=TargetConfig(str(run_dir / "target"), dtype="float32", device="cpu"),
        data=DataConfig(path=str(sources), prompt_tokens=12, calibration_share=0.2, evaluation_share=0.2),
        regenerate=RegenerateConfig(samples=12, held_out=3, max_new_tokens=8, batch=4),
        head=HeadTrainConfig(
            draft_vocab_size=100,
            ttt_steps=2,
            max_steps=2,
            batch_tokens=128,
            batches_per_step=1,
            mixed_precision="no",
            validation_samples=2,
            trackers=[],
        ),
        corpus=CorpusConfig(successors=4),
        policy=CalibrateConfig(
            prompts=2,
            max_new_tokens=10,
            topk=3,
            num_steps=3,
            num_draft_tokens=[1, 4, 8],
            retrieval_depth=3,
            minutes=0.01,
            least_rounds=10,
        ),
        evaluation=EvaluateConfig(prompts=2, max_new_tokens=10, repeats=2),
    )


def spread_over_devices(monkeypatch) -> list[bool]:
    """Makes `device_map="auto"` put a target's odd layers on the disk; returns what was loaded so, as it comes."""
    load, spread = AutoModelForCausalLM.from_pretrained, []

    def loaded(path, *arguments, device_map=None, **named):
        if device_map == "auto":
            layers = AutoConfig.from_pretrained(path).num_hidden_layers
            places = {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(layers)}
            others = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
            device_map = places | dict.fromkeys(others, "cpu")
        spread.append(device_map is not None)
        return load(path, *arguments, device_map=device_map, **named)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    return spread

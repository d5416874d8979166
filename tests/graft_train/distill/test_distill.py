"""The stage: what it writes, resuming to the bit, exact gradient accumulation, and bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from graft_inference import GraftError
from graft_inference.head_checkpoint import load_head
from graft_train.config import Config
from graft_train.data.samples import append_samples
from graft_train.data.states import TappedTarget
from graft_train.data.target import TargetConfig
from graft_train.distill import distill, loop
from graft_train.distill.batches import online_states, to_rows
from graft_train.distill.config import HeadTrainConfig
from graft_train.distill.loop import start_training, train_step

from .pair import VOCAB, samples, tiny_head, tiny_target

SETTINGS = {
    "draft_vocab_size": 8,
    "unroll_steps": 3,
    "epochs": 4,
    "batch_tokens": 40,
    "gradient_accumulation": 2,
    "learning_rate": 3e-3,
    "mixed_precision": "no",
    "checkpoint_every": 3,
    "keep_checkpoints": 1,
    "log_every": 1,
    "wandb": False,
}


def make_run(directory: Path, **changes) -> Config:
    """A run directory with a target and samples, as the earlier stages leave it."""
    run_dir, target = directory / "run", directory / "tiny"
    if not run_dir.exists():
        tiny_target().save_pretrained(target)
        (run_dir / "data").mkdir(parents=True)
        (run_dir / "data" / "stage.json").write_text(json.dumps({"fingerprint": "hand-made"}))
        with (run_dir / "data" / "samples.jsonl").open("wb") as file:
            append_samples(file, samples(30))
    return Config(
        run_dir=str(run_dir),
        target=TargetConfig(name_or_path=str(target), dtype="float32", device="cpu"),
        head=HeadTrainConfig(**(SETTINGS | changes)),
    )


def metrics(head: Path) -> list[dict]:
    lines = [json.loads(line) for line in (head / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def test_a_run_writes_a_head_that_learned(tmp_path):
    directory = distill(make_run(tmp_path, epochs=20))
    head = load_head(directory)
    assert head.config.tapped_layers == (0, 2, 3)
    assert head.config.draft_vocab_size == len(head.target_ids) == 8
    assert max(head.target_ids) < VOCAB // 3  # the answers' tokens
    curve = metrics(directory)
    assert [line["step"] for line in curve] == list(range(1, len(curve) + 1))
    assert sum(sum(line["loss"]) for line in curve[-5:]) < 0.9 * sum(sum(line["loss"]) for line in curve[:5])
    summary = json.loads((directory / "training.json").read_text())
    assert summary["validation_samples"] == 3
    assert summary["validation"]["tau"] >= 1
    assert summary["coverage"] < 1
    assert {path.name for path in directory.iterdir()} == {
        "config.json",
        "model.safetensors",
        "metrics.jsonl",
        "training.json",
        "stage.json",
    }


@pytest.mark.parametrize(("killed_after", "cache_states"), [(2, False), (4, False), (8, True)])
def test_killed_and_run_again_equals_no_interruption(tmp_path, monkeypatch, killed_after, cache_states):
    whole = distill(make_run(tmp_path / "whole", cache_states=cache_states))
    config, steps = make_run(tmp_path / "killed", cache_states=cache_states), 0

    def dying(*arguments):
        nonlocal steps
        if steps == killed_after:
            raise KeyboardInterrupt
        steps += 1
        return train_step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train_step", dying)
        distill(config)
    partial = Path(config.run_dir) / "head.partial"
    assert not (Path(config.run_dir) / "head").exists()
    kept = killed_after // 3 * 3  # checkpoints come every third step
    saved = [path.name for path in (partial / "checkpoints").glob("*")]
    assert saved == ([f"step-{kept:08d}"] if kept else [])

    counted = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", lambda *arguments: counted.append(1) or train_step(*arguments))
        resumed = distill(config)
    assert metrics(resumed) == metrics(whole)
    assert len(counted) == len(metrics(whole)) - kept
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(load_file(resumed / "model.safetensors")[name], tensor), name


def test_a_torn_checkpoint_is_not_resumed_from(tmp_path):
    config = make_run(tmp_path)
    torn = Path(config.run_dir) / "head.partial" / "checkpoints" / "step-00000003.partial"
    torn.mkdir(parents=True)
    (torn / "model.safetensors").write_bytes(b"half")
    (Path(config.run_dir) / "head.partial" / "stage.json").unlink(missing_ok=True)
    with pytest.raises(GraftError, match="not made by a stage"):
        distill(config)
    accelerator = Accelerator(cpu=True)
    training = start_training(accelerator, *parts(), HeadTrainConfig(**SETTINGS))
    assert loop._resume(training, torn.parent) == 0
    assert not torn.exists()


def parts():
    target = TappedTarget(tiny_target(), (0, 2, 3))
    return tiny_head(), target, online_states(target), to_rows(samples(), 64, VOCAB)


def accumulate(batches: list[list[int]]) -> tuple[dict[str, torch.Tensor], object]:
    """The gradients of one optimizer step over these batches."""
    settings = HeadTrainConfig(**(SETTINGS | {"clip": 1e9}))
    training = start_training(Accelerator(cpu=True), *parts(), settings)
    gradients: dict[str, torch.Tensor] = {}

    def keep(*unused):
        gradients.update({name: p.grad.clone() for name, p in training.head.named_parameters()})

    training.optimizer.optimizer.register_step_pre_hook(keep)
    sums, _ = train_step(training, batches, 1e-3)
    return gradients, sums


def test_accumulated_batches_of_unequal_counts_equal_one_batch():
    whole, whole_sums = accumulate([[0, 1, 2, 3, 4]])
    parts_gradients, parts_sums = accumulate([[0], [1, 2, 3], [4]])
    assert parts_sums.trained_K.tolist() == whole_sums.trained_K.tolist()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts_gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_learning_rate_warms_up_and_falls_to_zero():
    settings = HeadTrainConfig(learning_rate=1.0, warmup_share=0.1)
    rates = [loop.learning_rate(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1)
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_resume_never_starts_again(tmp_path):
    training = start_training(Accelerator(cpu=True), *parts(), HeadTrainConfig(**SETTINGS))
    loop._checkpoint(training, tmp_path, 3)
    assert loop._resume(training, tmp_path) == 3
    training.settings.resume = "never"
    assert loop._resume(training, tmp_path) == 0


def test_bf16_trains(tmp_path):
    curve = metrics(distill(make_run(tmp_path, mixed_precision="bf16", epochs=20)))
    assert sum(curve[-1]["loss"]) < 0.95 * sum(curve[0]["loss"])


def test_wandb_is_offline_and_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    directory = distill(make_run(tmp_path, wandb=True, max_steps=2))
    run_id = (directory / "wandb_id").read_text()
    assert [path.name for path in (directory / "wandb").glob(f"offline-run-*-{run_id}")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unroll_steps": 0}, "head.unroll_steps=0"),
        ({"learning_rate": -1.0}, "head.learning_rate=-1.0"),
        ({"mixed_precision": "fp16"}, "head.mixed_precision=fp16"),
        ({"resume": "yes"}, "head.resume=yes"),
        ({"max_length": 2}, "head.max_length=2"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(GraftError, match=message):
        HeadTrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tapped_layers": [0, 2, 9]}, r"head.tapped_layers=\[0, 2, 9\].*layers 0\.\.3"),
        ({"tapped_layers": [2, 0, 3]}, "ascending"),
        ({"max_length": 3}, "head.max_length=3"),
        ({"gradient_accumulation": 500}, "lower head.batch_tokens or head.gradient_accumulation"),
    ],
)
def test_heads_that_cannot_be_trained_are_refused_and_nothing_is_left(tmp_path, changes, message):
    config = make_run(tmp_path, **changes)
    with pytest.raises(GraftError, match=message):
        distill(config)
    assert not (Path(config.run_dir) / "head").exists()


def test_data_of_another_target_is_refused(tmp_path):
    config = make_run(tmp_path)
    tiny_target(vocab_size=9).save_pretrained(config.target.name_or_path)
    with pytest.raises(GraftError, match="regenerated with another target"):
        distill(config)


def test_two_processes_equal_one_that_accumulates(tmp_path):
    """Two ranks of one batch each take the step that one process takes over two."""
    script = tmp_path / "two_ranks.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from graft_train.distill import distill\n"
        "from tests.graft_train.distill.test_distill import make_run\n"
        "distill(make_run(Path(sys.argv[1]), gradient_accumulation=1, max_steps=4))\n"
    )
    alone = distill(make_run(tmp_path / "one", gradient_accumulation=2, max_steps=4))
    make_run(tmp_path / "two")
    root = Path(__file__).parents[3]
    paths = [str(root), str(root / "inference"), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
        + [str(script), str(tmp_path / "two")],
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    together = tmp_path / "two" / "run" / "head"
    for one, two in zip(metrics(alone), metrics(together), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    expected = load_file(alone / "model.safetensors")
    for name, tensor in load_file(together / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3, msg=name)
